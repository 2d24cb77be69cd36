//! Time: buckets of completed keys, how they are filled, found and dropped.

pub(crate) mod filters;
pub(crate) mod recovery;
pub(crate) mod rotation;
pub(crate) mod seal;
pub(crate) mod set;
pub(crate) mod window;
