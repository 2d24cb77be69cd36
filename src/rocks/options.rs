//! RocksDB's options, each with its reason.

use std::path::Path;

use super::failed;
use onlyonce_core::Result;
use rocksdb::{
    BlockBasedOptions, BlockBasedTablePinningTier, Cache, DBCompactionStyle, InfoLogger, LogLevel, Options,
    UniversalCompactOptions,
};

const MIB: usize = 1 << 20;
/// The size from which RocksDB may rewrite its manifest.
const MANIFEST_BYTES: usize = MIB / 4;
/// SSTs that one compaction merges: of `meta`, and of a bucket that still gets keys.
const MERGED_META_SSTS: i32 = 4;
const MERGED_BUCKET_SSTS: i32 = 32;
/// The options of a bucket that has ended: RocksDB merges four or more sorted runs of about the same size. So most keys are in one
/// run, and what a message that arrives late adds is not merged with them each time.
pub(super) const ENDED_BUCKET: [(&str, &str); 2] =
    [("level0_file_num_compaction_trigger", "4"), ("compaction_options_universal", "{min_merge_width=4}")];

/// The options of one database. Each kind of column family has its own set, so that none uses RocksDB's defaults.
pub(super) struct Tuning {
    block_cache: Cache,
    pub(super) memory_budget: usize,
}

impl Tuning {
    /// A quarter of the budget is the block cache.
    pub(super) fn for_budget(memory_budget: usize) -> Self {
        Self {
            // Concurrent lookups use it without a lock. 0: it estimates the size of an entry itself.
            block_cache: Cache::new_hyper_clock_cache(memory_budget / 4, 0),
            memory_budget,
        }
    }

    /// Options of the whole database.
    pub(super) fn database(&self, path: &Path) -> Result<Options> {
        let mut options = Options::default();
        // RocksDB's log is off, and the journal has what was not flushed. A flush at the close could write a change whose
        // journal record was never synced. The binding has no setter for this option.
        let unflushed = options.get_options_from_string("avoid_flush_during_shutdown=true");
        options = unflushed.map_err(|error| failed("configuring", path, &error))?;
        // SSTs are sorted before they are ingested, so two threads are enough: one for a flush, one for a compaction.
        options.set_max_background_jobs(2);
        // The usual limit of a process is 1,024 descriptors, and the application needs most of them.
        options.set_max_open_files(512);
        // By default RocksDB starts 16 threads in every column family to open files.
        options.set_max_file_opening_threads(1);
        // Writes SSTs to disk in small steps, so that syncs of the journal do not wait for them.
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
        Ok(options)
    }

    /// `meta`: a few small values, and the side writes of completions. The store flushes it with each of its own flushes,
    /// after a sync of the journal. RocksDB flushes a full memtable earlier: that of one call with very large messages. It is
    /// not larger, because RocksDB resumes after a full disk only when so much space is free.
    pub(super) fn meta(&self) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(self.memory_budget);
        options.set_block_based_table_factory(&self.table());
        // Each flush leaves a small SST. Universal compaction merges the small ones with each other and rarely
        // rewrites the large one of an outbox.
        options.set_compaction_style(DBCompactionStyle::Universal);
        options.set_level_zero_file_num_compaction_trigger(MERGED_META_SSTS);
        never_stall(&mut options);
        options
    }

    /// A bucket: SSTs are ingested, read by whole key, merged once or twice, and dropped with the bucket. See [`ENDED_BUCKET`].
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
        // Most merges wait until the bucket has ended: earlier ones would write the same keys twice. Without any, a lookup would
        // ask the filters of hundreds of SSTs.
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
