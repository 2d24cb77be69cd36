//! Errors of consumer settings.

use std::fmt::Display;

/// A setting that a consumer cannot be built with. Nothing was connected, read or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("setting `{setting}` is {value}, but must be {expected}")]
#[non_exhaustive]
pub struct SettingError {
    /// The builder's method, or the key of the client's configuration.
    pub setting: &'static str,
    /// The rejected value.
    pub value: String,
    /// The accepted values.
    pub expected: &'static str,
}

impl SettingError {
    /// For adapter authors.
    #[must_use]
    pub fn new(setting: &'static str, value: impl Display, expected: &'static str) -> Self {
        Self { setting, value: value.to_string(), expected }
    }

    /// Checks a setting. For adapter authors.
    ///
    /// # Errors
    ///
    /// [`SettingError::new`] if `is_valid` is false.
    pub fn check(
        is_valid: bool,
        setting: &'static str,
        value: impl Display,
        expected: &'static str,
    ) -> Result<(), Self> {
        if is_valid { Ok(()) } else { Err(Self::new(setting, value, expected)) }
    }
}
