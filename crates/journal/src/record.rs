//! Records and their fragments.
//!
//! A record is written as one fragment, or as several where it crosses the end of a segment:
//!
//! ```text
//! fragment := crc (4) | length (4) | kind and part (1) | gap (3) | lsn (4) | payload (length)
//!   crc    := CRC-32C of the segment's salt (8), the whole lsn (8), the fields after the crc, and the payload
//!   kind   := 1 data | 2 checkpoint | 3 mark                             (bits 0 to 3)
//!   part   := 1 whole | 2 first | 3 middle | 4 last                      (bits 4 to 7)
//!   gap    := the lsn minus the durable lsn, or 2^24 - 1 if it is larger
//!   lsn    := the lower 32 bits
//! ```
//!
//! Every fragment has its own lsn, one higher than that of the fragment before it. All fragments below the durable lsn were
//! on disk before this one was written.

/// The size of a fragment without its payload.
pub(crate) const HEADER: usize = 16;

/// The gap that states no durable lsn. Larger gaps are none.
pub(crate) const NO_CLAIM: u64 = (1 << 24) - 1;

/// What a record is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What a caller appended.
    Data = 1,
    /// What a replay begins with.
    Checkpoint = 2,
    /// Nothing but its durable lsn.
    Mark = 3,
}

/// Which part of a record a fragment has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Whole = 1,
    First = 2,
    Middle = 3,
    Last = 4,
}

impl Part {
    pub(crate) fn of(is_first: bool, is_last: bool) -> Self {
        match (is_first, is_last) {
            (true, true) => Self::Whole,
            (true, false) => Self::First,
            (false, false) => Self::Middle,
            (false, true) => Self::Last,
        }
    }

    pub(crate) fn begins(self) -> bool {
        matches!(self, Self::Whole | Self::First)
    }

    pub(crate) fn ends(self) -> bool {
        matches!(self, Self::Whole | Self::Last)
    }
}

/// A fragment without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) kind: Kind,
    pub(crate) part: Part,
    pub(crate) lsn: u64,
    /// All fragments with a lower lsn were on disk when this one was written. 0 states nothing.
    pub(crate) durable_lsn: u64,
}

/// The part of the checksum that all fragments of a segment share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Salt(u32);

impl Salt {
    pub(crate) fn new(salt: u64) -> Self {
        Self(crc32c::crc32c(&salt.to_le_bytes()))
    }

    fn crc(self, lsn: u64, fields: &[u8], payload: &[u8]) -> u32 {
        let crc = crc32c::crc32c_append(self.0, &lsn.to_le_bytes());
        crc32c::crc32c_append(crc32c::crc32c_append(crc, fields), payload)
    }
}

/// Appends a fragment to `out`. The payload is shorter than 4 GiB.
pub(crate) fn put(fragment: Fragment, payload: &[u8], salt: Salt, out: &mut Vec<u8>) {
    let gap = match fragment.durable_lsn {
        0 => NO_CLAIM,
        durable_lsn => (fragment.lsn - durable_lsn.min(fragment.lsn)).min(NO_CLAIM),
    };
    let mut fields = [0; HEADER - 4];
    fields[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    fields[4..8].copy_from_slice(&((gap as u32) << 8).to_le_bytes());
    fields[4] = fragment.kind as u8 | (fragment.part as u8) << 4;
    fields[8..].copy_from_slice(&(fragment.lsn as u32).to_le_bytes());
    out.extend_from_slice(&salt.crc(fragment.lsn, &fields, payload).to_le_bytes());
    out.extend_from_slice(&fields);
    out.extend_from_slice(payload);
}

/// Reads the fragment with this lsn at the start of `bytes`, and its payload. `None` if there is no valid one.
pub(crate) fn read(bytes: &[u8], lsn: u64, salt: Salt) -> Option<(Fragment, &[u8])> {
    let header = bytes.first_chunk::<HEADER>()?;
    if word(header, 12) != lsn as u32 {
        return None;
    }
    let payload = bytes.get(HEADER..)?.get(..word(header, 4) as usize)?;
    let fragment = Fragment { kind: kind(header)?, part: part(header)?, lsn, durable_lsn: durable_lsn(header, lsn) };
    (salt.crc(lsn, &header[4..], payload) == word(header, 0)).then_some((fragment, payload))
}

/// The bytes that are a kind and a part.
const KINDS_AND_PARTS: [bool; 256] = {
    let mut valid = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        valid[byte] = matches!(byte & 15, 1..=3) && matches!(byte >> 4, 1..=4);
        byte += 1;
    }
    valid
};

/// Where a fragment may begin in `bytes`, at the earliest. A search calls this for everything that it skips.
pub(crate) fn next_possible(bytes: &[u8]) -> Option<usize> {
    bytes.get(8..)?.iter().position(|byte| KINDS_AND_PARTS.get(usize::from(*byte)) == Some(&true))
}

/// The size of a payload that may be at the start of `bytes`, of a fragment whose lsn is at most `most` above `first_lsn`. A
/// search calls this at every byte, so it computes no checksum.
pub(crate) fn may_follow(bytes: &[u8], first_lsn: u64, most: u64) -> Option<usize> {
    let header = bytes.first_chunk::<HEADER>()?;
    if kind(header).is_none() || part(header).is_none() {
        return None;
    }
    let (ahead, len) = (ahead(header, first_lsn), word(header, 4) as usize);
    (u64::from(ahead) <= most && len <= bytes.len() - HEADER).then_some(len)
}

/// Reads a fragment whose lsn is unknown, but within `first_lsn..first_lsn + 2^32`.
pub(crate) fn read_after(bytes: &[u8], first_lsn: u64, salt: Salt) -> Option<(Fragment, &[u8])> {
    let header = bytes.first_chunk::<HEADER>()?;
    read(bytes, first_lsn.checked_add(ahead(header, first_lsn).into())?, salt)
}

fn ahead(header: &[u8; HEADER], first_lsn: u64) -> u32 {
    word(header, 12).wrapping_sub(first_lsn as u32)
}

fn word(header: &[u8; HEADER], at: usize) -> u32 {
    header.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn kind(header: &[u8; HEADER]) -> Option<Kind> {
    [Kind::Data, Kind::Checkpoint, Kind::Mark].into_iter().find(|kind| *kind as u8 == header[8] & 15)
}

fn part(header: &[u8; HEADER]) -> Option<Part> {
    [Part::Whole, Part::First, Part::Middle, Part::Last].into_iter().find(|part| *part as u8 == header[8] >> 4)
}

fn durable_lsn(header: &[u8; HEADER], lsn: u64) -> u64 {
    match u64::from(word(header, 8) >> 8) {
        NO_CLAIM => 0,
        gap => lsn.saturating_sub(gap),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(lsn: u64, durable_lsn: u64) -> Fragment {
        Fragment { kind: Kind::Data, part: Part::Whole, lsn, durable_lsn }
    }

    #[test]
    fn a_fragment_is_read_only_with_its_own_salt_and_lsn() {
        let salt = Salt::new(7);
        for lsn in [0, 5, u64::from(u32::MAX), 1 << 40, u64::MAX] {
            for payload in [&b""[..], b"x", &[3; 5_000]] {
                let mut bytes = Vec::new();
                put(fragment(lsn, lsn), payload, salt, &mut bytes);
                assert_eq!(bytes.len(), HEADER + payload.len());
                bytes.extend([9; 20]);
                assert_eq!(read(&bytes, lsn, salt), Some((fragment(lsn, lsn), payload)));
                assert_eq!(read(&bytes, lsn, Salt::new(8)), None);
                assert_eq!(read(&bytes, lsn.wrapping_add(1), salt), None);
                assert_eq!(read(&bytes, lsn ^ 1 << 32, salt), None, "the checksum has the whole lsn");
                assert_eq!(read_after(&bytes, lsn.saturating_sub(3), salt), read(&bytes, lsn, salt));
                assert_eq!(may_follow(&bytes, lsn.saturating_sub(3), 3), Some(payload.len()));
                assert_eq!(may_follow(&bytes, lsn.wrapping_add(1), 1_000), None);
            }
        }
    }

    #[test]
    fn a_fragment_with_any_byte_changed_or_cut_off_is_rejected() {
        let salt = Salt::new(1);
        let mut bytes = Vec::new();
        put(fragment(3, 2), b"payload", salt, &mut bytes);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                assert_eq!(read(&bytes, 3, salt), None, "byte {at}, bit {bit}");
                bytes[at] ^= 1 << bit;
            }
            assert_eq!(read(&bytes[..at], 3, salt), None);
        }
        assert!(read(&bytes, 3, salt).is_some());
        assert_eq!(read(&[0; 64], 0, Salt::new(0)), None, "zeros are no fragment");
    }

    #[test]
    fn a_durable_lsn_that_does_not_fit_states_nothing() {
        let salt = Salt::new(1);
        for (lsn, durable_lsn, stated) in
            [(9, 0, 0), (9, 9, 9), (9, 1, 1), (1 << 24, 1, 0), (1 << 24, 2, 2), (1 << 24, 1 << 24, 1 << 24)]
        {
            let mut bytes = Vec::new();
            put(fragment(lsn, durable_lsn), b"", salt, &mut bytes);
            let (read, _) = read(&bytes, lsn, salt).unwrap();
            assert_eq!(read.durable_lsn, stated, "{lsn}, {durable_lsn}");
        }
    }

    #[test]
    fn a_search_skips_bytes_that_are_no_kind_and_part() {
        for byte in 0..=255 {
            let mut bytes = [0; 40];
            bytes[8 + 20] = byte;
            let is_possible = kind(&bytes[20..].first_chunk().copied().unwrap()).is_some()
                && part(&bytes[20..].first_chunk().copied().unwrap()).is_some();
            assert_eq!(next_possible(&bytes), is_possible.then_some(20), "{byte}");
        }
    }

    #[test]
    fn each_kind_and_part_is_read_back() {
        let salt = Salt::new(1);
        for kind in [Kind::Data, Kind::Checkpoint, Kind::Mark] {
            for (is_first, is_last) in [(true, true), (true, false), (false, false), (false, true)] {
                let part = Part::of(is_first, is_last);
                assert_eq!((part.begins(), part.ends()), (is_first, is_last));
                let mut bytes = Vec::new();
                let fragment = Fragment { kind, part, lsn: 4, durable_lsn: 3 };
                put(fragment, b"p", salt, &mut bytes);
                assert_eq!(read(&bytes, 4, salt), Some((fragment, &b"p"[..])));
            }
        }
    }
}
