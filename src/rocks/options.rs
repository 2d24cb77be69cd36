//! RocksDB's options, each with its reason.

use rocksdb::{
    BlockBasedOptions, BlockBasedTablePinningTier, Cache, DBCompactionStyle, DBRecoveryMode, InfoLogger, LogLevel,
    Options, UniversalCompactOptions,
};

const MIB: usize = 1 << 20;
/// The size from which RocksDB may rewrite its manifest.
const MANIFEST_BYTES: usize = MIB / 4;
/// SSTs that one compaction merges: of the journal or `meta`, and of a bucket.
const MERGED_JOURNAL_SSTS: i32 = 4;
const MERGED_BUCKET_SSTS: i32 = 8;

/// The options of one database. Each kind of column family has its own set, so that none uses RocksDB's defaults.
pub(super) struct Tuning {
    block_cache: Cache,
    memtable_bytes: usize,
}

impl Tuning {
    /// An eighth of the budget is the block cache; another eighth is RocksDB's memtable of the journal. That must
    /// hold the records of two flushes: if RocksDB flushes it before the store has flushed and deleted its records,
    /// they are written to disk twice.
    pub(super) fn for_budget(memory_budget: usize) -> Self {
        Self {
            // Concurrent lookups use it without a lock. 0: it estimates the size of an entry itself.
            block_cache: Cache::new_hyper_clock_cache(memory_budget / 8, 0),
            memtable_bytes: (memory_budget / 8).clamp(8 * MIB, 64 * MIB),
        }
    }

    /// Bytes written between two file manifests: a quarter of a memtable. A log is as long as a memtable, so each new
    /// log is in a manifest soon after its start.
    pub(super) fn manifest_interval_bytes(&self) -> u64 {
        (self.memtable_bytes / 4) as u64
    }

    /// Options of the whole database.
    pub(super) fn database(&self) -> Options {
        let mut options = Options::default();
        // A crash leaves a log that ends with a partial record. A corrupt record before the end is corruption and
        // must not be taken for the end (G6). Point-in-time recovery, RocksDB's default, would silently drop
        // everything after it. This mode still takes some corrupt lengths for the end, so `wal.rs` checks the logs
        // first.
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        options.set_track_and_verify_wals_in_manifest(true);
        // Each log records its predecessor's number and length, so that a missing or truncated log is detected. The
        // binding has no setter for this option.
        if let Ok(verifying) = options.get_options_from_string("track_and_verify_wals=true") {
            options = verifying;
        }
        // Some flushes also flush the journal, which frees the log. This bounds the log if there are many claims but
        // few flushes.
        options.set_max_total_wal_size(4 * self.memtable_bytes as u64);
        // SSTs are sorted before they are ingested, so two threads are enough: one for a flush, one for a compaction.
        options.set_max_background_jobs(2);
        // The usual limit of a process is 1,024 descriptors, and the application needs most of them.
        options.set_max_open_files(512);
        // By default RocksDB starts 16 threads in every column family to open files.
        options.set_max_file_opening_threads(1);
        // Writes SSTs to disk in small steps, so that syncs of the log do not wait for them.
        options.set_bytes_per_sync(MIB as u64);
        // The manifest grows with every flush and bucket until RocksDB rewrites it: at this size, or at six times the
        // needed size. RocksDB's default is a gigabyte.
        options.set_max_manifest_file_size(MANIFEST_BYTES);
        // Replaces RocksDB's own log file, which gets hundreds of lines for each bucket, keeps them in memory, and
        // repeats them in each new file.
        options.set_log_level(LogLevel::Warn);
        options.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Warn, forward_log));
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options
    }

    /// The journal: records ordered by number, read only at open, deleted soon after they are written.
    pub(super) fn journal(&self) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(self.memtable_bytes);
        options.set_max_write_buffer_number(4);
        options.set_block_based_table_factory(&self.table());
        // SSTs of the journal do not overlap. Leveled compaction would move each of them down unchanged and never
        // merge them: one SST would pile up for each open that found records.
        options.set_compaction_style(DBCompactionStyle::Universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_JOURNAL_SSTS);
        never_stall(&mut options);
        options
    }

    /// `meta`: a few small values, and the side writes of completions. Its memtables are as large in total as the
    /// journal's, split into four, so that writers do not stall while a full one is flushed.
    pub(super) fn meta(&self) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(self.memtable_bytes / 4);
        options.set_max_write_buffer_number(4);
        options.set_block_based_table_factory(&self.table());
        // Each open leaves a small SST. Universal compaction merges the small ones with each other and rarely
        // rewrites the large one of an outbox.
        options.set_compaction_style(DBCompactionStyle::Universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_JOURNAL_SSTS);
        never_stall(&mut options);
        options
    }

    /// A bucket: SSTs are ingested, read by whole key, compacted a few times at most, and dropped with the bucket.
    pub(super) fn bucket(&self) -> Options {
        let mut options = Options::default();
        // Only `forget` writes here other than by ingestion.
        options.set_write_buffer_size(MIB);
        let mut table = self.table();
        // A key that the in-memory filter does not rule out is looked up in every SST of the bucket. With this filter
        // 1 % of its false positives read a block.
        table.set_bloom_filter(10.0, false);
        table.set_whole_key_filtering(true);
        // Every lookup in the bucket reads these blocks, and they are small compared to the keys.
        table.set_unpartitioned_pinning_tier(BlockBasedTablePinningTier::All);
        table.set_top_level_index_pinning_tier(BlockBasedTablePinningTier::All);
        options.set_block_based_table_factory(&table);
        // Eight SSTs become one: each key is rewritten once for every eightfold growth of its bucket.
        options.set_compaction_style(DBCompactionStyle::Universal);
        let mut universal = UniversalCompactOptions::default();
        universal.set_min_merge_width(MERGED_BUCKET_SSTS);
        universal.set_max_size_amplification_percent(1_000_000);
        options.set_universal_compaction_options(&universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_BUCKET_SSTS);
        never_stall(&mut options);
        options
    }

    fn table(&self) -> BlockBasedOptions {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.block_cache);
        // Index and filter blocks count against the cache's budget.
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(false);
        table
    }
}

/// Forwards RocksDB's log lines to `tracing`.
fn forward_log(level: LogLevel, line: &str) {
    // A subscriber that panics must not unwind into RocksDB, which ends the process.
    let _ = std::panic::catch_unwind(|| match level {
        LogLevel::Error | LogLevel::Fatal => tracing::warn!(target: "onlyonce::rocksdb", "{}", line.trim_end()),
        LogLevel::Warn => tracing::info!(target: "onlyonce::rocksdb", "{}", line.trim_end()),
        // `Header` lines list options and ignore the log level.
        LogLevel::Header | LogLevel::Info | LogLevel::Debug => {}
    });
}

/// Disables write stalls on pending compactions. A flush adds only a few SSTs, and with stalls a compaction that
/// cannot finish, because the disk is full, would block the flush forever and without an error.
fn never_stall(options: &mut Options) {
    options.set_level_zero_slowdown_writes_trigger(i32::MAX);
    options.set_level_zero_stop_writes_trigger(i32::MAX);
    options.set_soft_pending_compaction_bytes_limit(0);
    options.set_hard_pending_compaction_bytes_limit(0);
}
