//! Every tuning value, with its reason.

use rocksdb::{
    BlockBasedOptions, BlockBasedTablePinningTier, Cache, DBCompactionStyle, DBRecoveryMode, InfoLogger, LogLevel,
    Options, UniversalCompactOptions,
};

const MIB: usize = 1 << 20;
/// The length from which on a manifest may be written afresh.
const MANIFEST_BYTES: usize = MIB / 4;
/// Tables of the journal or of `meta`, and runs of a bucket, that are merged into one.
const MERGED_TABLES: i32 = 4;
const MERGED_RUNS: i32 = 8;

/// The options of one database: one set a kind of column family, so that none is left to RocksDB's defaults.
pub(super) struct Tuning {
    block_cache: Cache,
    memtable_bytes: usize,
}

impl Tuning {
    /// An eighth of the budget caches blocks of the buckets; another is the journal's memtable, which has to hold the rows
    /// of two seals: one that is flushed before its rows are sealed is written twice.
    pub(super) fn for_budget(memory_budget: usize) -> Self {
        Self {
            // Lookups of many threads share it without a lock. It works out the usual size of an entry by itself.
            block_cache: Cache::new_hyper_clock_cache(memory_budget / 8, 0),
            memtable_bytes: (memory_budget / 8).clamp(8 * MIB, 64 * MIB),
        }
    }

    /// A log is as long as a memtable: it is noted soon after it was begun, and seldom enough to cost nothing.
    pub(super) fn manifest_interval_bytes(&self) -> u64 {
        (self.memtable_bytes / 4) as u64
    }

    /// What holds for the whole database.
    pub(super) fn database(&self) -> Options {
        let mut options = Options::default();
        // A log that ends in half a record is what a crash leaves; a bad record before the end is corruption and
        // must not pass for the end (G6). Point-in-time recovery, RocksDB's default, would drop all that follows it; this
        // one still takes some bad lengths for the end, which is why `log.rs` reads the logs first.
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        options.set_track_and_verify_wals_in_manifest(true);
        // Each log says what the one before it was: one that is gone, or shorter than it was, is noticed. No function of
        // the binding sets it.
        if let Ok(verifying) = options.get_options_from_string("track_and_verify_wals=true") {
            options = verifying;
        }
        // Now and then a seal flushes the journal, which cuts the log. This bounds the log where seals are rare but claims many.
        options.set_max_total_wal_size(4 * self.memtable_bytes as u64);
        // Runs are sorted before they come here; two threads are enough for a flush beside a merge.
        options.set_max_background_jobs(2);
        // The usual limit of a process is 1,024 descriptors, and most of them are not ours.
        options.set_max_open_files(512);
        // RocksDB opens sixteen files ahead at most, and starts sixteen threads for it in every family.
        options.set_max_file_opening_threads(1);
        // Runs and flushed tables reach the disk bit by bit, so that the log's syncs do not queue behind them.
        options.set_bytes_per_sync(MIB as u64);
        // A manifest grows with every seal, flush and bucket until it is written afresh: at this length, or at six times what
        // is needed. RocksDB's own limit is a gigabyte.
        options.set_max_manifest_file_size(MANIFEST_BYTES);
        // In the place of a file of RocksDB's own, which notes some hundred lines for each bucket, keeps all of them in memory
        // as well, and writes them once more whenever it begins a new file.
        options.set_log_level(LogLevel::Warn);
        options.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Warn, tell));
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options
    }

    /// The journal: rows in the order of their numbers, read only at open, dead soon after they are written.
    pub(super) fn journal(&self) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(self.memtable_bytes);
        options.set_max_write_buffer_number(4);
        options.set_block_based_table_factory(&self.table());
        // Tables of the journal do not overlap. In levels each would be moved down as it is and stay: one for each open that
        // found rows.
        options.set_compaction_style(DBCompactionStyle::Universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_TABLES);
        never_stall(&mut options);
        options
    }

    /// A handful of short rows, and what callers store with their completions. As many bytes wait here at most as in the
    /// journal's memtable, in four parts: one that is full must not stop writers while it is flushed.
    pub(super) fn meta(&self) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(self.memtable_bytes / 4);
        options.set_max_write_buffer_number(4);
        options.set_block_based_table_factory(&self.table());
        // Each open leaves a small table. Merged among themselves, they leave a large one with an outbox alone.
        options.set_compaction_style(DBCompactionStyle::Universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_TABLES);
        never_stall(&mut options);
        options
    }

    /// A bucket: sorted runs that are ingested, read by whole key, merged a few times at most, and dropped whole.
    pub(super) fn bucket(&self) -> Options {
        let mut options = Options::default();
        // Only `forget` writes here without a run.
        options.set_write_buffer_size(MIB);
        let mut table = self.table();
        // A key that the in-memory filter names is asked of every run of the bucket: 1 % of the wrong ones read a
        // block.
        table.set_bloom_filter(10.0, false);
        table.set_whole_key_filtering(true);
        // Asked for each key that is looked up here, and small beside the keys.
        table.set_unpartitioned_pinning_tier(BlockBasedTablePinningTier::All);
        table.set_top_level_index_pinning_tier(BlockBasedTablePinningTier::All);
        options.set_block_based_table_factory(&table);
        // Eight runs become one: each key is rewritten once for every eightfold growth of its bucket.
        options.set_compaction_style(DBCompactionStyle::Universal);
        let mut universal = UniversalCompactOptions::default();
        universal.set_min_merge_width(MERGED_RUNS);
        universal.set_max_size_amplification_percent(1_000_000);
        options.set_universal_compaction_options(&universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_RUNS);
        never_stall(&mut options);
        options
    }

    fn table(&self) -> BlockBasedOptions {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.block_cache);
        // Inside the budget, with the blocks.
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(false);
        table
    }
}

/// What RocksDB says of itself goes where the rest of the store's events go.
fn tell(level: LogLevel, said: &str) {
    // A subscriber that panics must not unwind into RocksDB, which ends the process.
    let _ = std::panic::catch_unwind(|| match level {
        LogLevel::Error | LogLevel::Fatal => tracing::warn!(target: "onlyonce::rocksdb", "{}", said.trim_end()),
        LogLevel::Warn => tracing::info!(target: "onlyonce::rocksdb", "{}", said.trim_end()),
        // Options, whatever the level.
        LogLevel::Header | LogLevel::Info | LogLevel::Debug => {}
    });
}

/// Tables that wait for a merge hold nobody up. What is written is a few tables a seal, and a merge that cannot be done,
/// for the disk is full, would else have the seal wait for it without an end, and without an error.
fn never_stall(options: &mut Options) {
    options.set_level_zero_slowdown_writes_trigger(i32::MAX);
    options.set_level_zero_stop_writes_trigger(i32::MAX);
    options.set_soft_pending_compaction_bytes_limit(0);
    options.set_hard_pending_compaction_bytes_limit(0);
}
