//! Synchronisation primitives under one name, so that a model checker can replace them.

#[cfg(shuttle)]
pub(crate) use modelled::*;
#[cfg(not(shuttle))]
pub(crate) use real::*;

#[cfg(not(shuttle))]
mod real {
    pub(crate) use std::sync::atomic::AtomicBool;
    pub(crate) use std::thread::{Thread, current, park, yield_now};

    pub(crate) use parking_lot::{Mutex, MutexGuard};
}

#[cfg(shuttle)]
mod modelled {
    pub(crate) use shuttle::sync::atomic::AtomicBool;
    pub(crate) use shuttle::thread::{Thread, current, park, yield_now};
    pub(crate) use shuttle_parking_lot::{Mutex, MutexGuard};
}
