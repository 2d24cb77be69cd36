//! The names of segment files, and where their records begin.

/// The unit of writes. A write never has a part of a block, so that the kernel never reads a block to write it.
pub(crate) const BLOCK: usize = 4_096;

/// Where the fragments of a segment begin.
pub(crate) const DATA_START: usize = 2 * BLOCK;

const SUFFIX: &str = ".journal";

/// The name of a slot's file.
pub(crate) fn name(slot: u32) -> String {
    format!("{slot:06}{SUFFIX}")
}

/// The slot of a file. `None` for other names.
pub(crate) fn slot(name: &str) -> Option<u32> {
    let slot = name.strip_suffix(SUFFIX)?.parse().ok()?;
    (self::name(slot) == name).then_some(slot)
}
