//! Time buckets: column families of ended keys that are filled by flushes, looked up through the filter, and dropped
//! whole when all their keys have expired.

pub(crate) mod filters;
pub(crate) mod flush;
pub(crate) mod range;
pub(crate) mod recovery;
pub(crate) mod registry;
pub(crate) mod rotation;
