//! Time: buckets of completed keys, how they are filled, found and dropped.

pub(crate) mod filters;
pub(crate) mod flush;
pub(crate) mod range;
pub(crate) mod recovery;
pub(crate) mod registry;
pub(crate) mod rotation;
