//! Settings of adapters, checked when a consumer is built.

use std::fmt::Display;

/// A setting that a consumer cannot be built with. Nothing was connected, read or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("setting `{setting}` is {value}, but it must be {bounds}")]
#[non_exhaustive]
pub struct SettingError {
    /// The builder's method, or the key of the client's configuration.
    pub setting: &'static str,
    /// The value that was given.
    pub value: String,
    /// What would have been accepted.
    pub bounds: &'static str,
}

impl SettingError {
    /// For authors of adapters.
    #[must_use]
    pub fn new(setting: &'static str, value: impl Display, bounds: &'static str) -> Self {
        Self { setting, value: value.to_string(), bounds }
    }

    /// An error unless the value is accepted. For authors of adapters.
    ///
    /// # Errors
    ///
    /// The error of [`SettingError::new`], where it is not.
    pub fn unless(
        accepted: bool,
        setting: &'static str,
        value: impl Display,
        bounds: &'static str,
    ) -> Result<(), Self> {
        if accepted { Ok(()) } else { Err(Self::new(setting, value, bounds)) }
    }
}
