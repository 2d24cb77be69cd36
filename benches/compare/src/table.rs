//! Tables of figures in Markdown, for the terminal and the page.

use std::cmp::Reverse;

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use crate::args::Workload;
use crate::row::Row;
use crate::subject::Kind;

const COLUMNS: [&str; 18] = [
    "case",
    "subject",
    "durability",
    "keys",
    "buckets",
    "threads",
    "a call",
    "rate",
    "onlyonce",
    "p50 µs",
    "p99 µs",
    "p99.9 µs",
    "worst µs",
    "CPU µs/key",
    "RAM B/key",
    "disk B/key",
    "write amp",
    "fsyncs/s",
];

/// The rows of a workload. W4 also shows the rows of peers in W3, because they only insert.
pub fn rows_of(workload: Workload, rows: &[Row]) -> Vec<&Row> {
    let is_peer_of_life =
        |row: &&Row| workload == Workload::W4 && row.workload == Workload::W3 && row.subject != Kind::Onlyonce.name();
    let mut of: Vec<&Row> = rows.iter().filter(|row| row.workload == workload).collect();
    if !of.is_empty() {
        of.extend(rows.iter().filter(is_peer_of_life));
    }
    // In the order of measurement, but grouped by size and case.
    let order = |row: &&Row| {
        let case = of.iter().position(|other| other.case == row.case || is_insert(other, row)).unwrap_or(usize::MAX);
        // In W5 the time is fixed, and the number of keys differs.
        let keys = if row.workload == Workload::W5 { 0 } else { row.keys };
        (case, Reverse(keys), row.threads, row.batch == 1)
    };
    let mut sorted = of.clone();
    sorted.sort_by_key(order);
    sorted
}

/// A claim with completion, compared with the insert of a peer.
fn is_insert(one: &Row, other: &Row) -> bool {
    matches!((one.workload, other.workload), (Workload::W3, Workload::W4) | (Workload::W4, Workload::W3))
}

/// The rate of onlyonce divided by that of a row, at the same number of keys if possible.
pub fn ratio(rows: &[&Row], row: &Row) -> Option<f64> {
    let ours = |row: &Row, with_keys: bool| {
        rows.iter()
            .find(|other| {
                other.subject == Kind::Onlyonce.name()
                    && (other.case == row.case || is_insert(other, row))
                    && (other.threads, other.batch) == (row.threads, row.batch)
                    && (!with_keys || other.keys == row.keys)
            })
            .and_then(|other| other.figures.ops_per_s)
    };
    if row.subject == Kind::Onlyonce.name() {
        return None;
    }
    Some(ours(row, true).or_else(|| ours(row, false))? / row.figures.ops_per_s?)
}

/// The table of a workload in Markdown, without empty columns.
pub fn table(workload: Workload, rows: &[Row]) -> String {
    let rows = rows_of(workload, rows);
    let mut lines: Vec<Vec<String>> = rows.iter().map(|row| cells(&rows, row)).collect();
    let mut header: Vec<String> = COLUMNS.iter().map(|&name| name.to_owned()).collect();
    let mut more: Vec<&String> = Vec::new();
    for name in rows.iter().flat_map(|row| row.more.keys()) {
        if !more.contains(&name) {
            more.push(name);
        }
    }
    header.extend(more.iter().map(|name| spoken(name)));
    for (line, row) in lines.iter_mut().zip(&rows) {
        line.extend(more.iter().map(|name| row.more.get(*name).map_or_else(String::new, |value| figure(name, *value))));
    }
    let used: Vec<bool> = (0..header.len()).map(|i| lines.iter().any(|line| !line[i].is_empty())).collect();
    let keep = |line: Vec<String>| -> Vec<String> {
        line.into_iter().zip(&used).filter(|(_, used)| **used).map(|(cell, _)| cell).collect()
    };
    let header = keep(header);
    let words = ["case", "subject", "durability"];
    let alignments: Vec<CellAlignment> = header
        .iter()
        .map(|name| if words.contains(&name.as_str()) { CellAlignment::Left } else { CellAlignment::Right })
        .collect();
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    for line in lines {
        table.add_row(keep(line));
    }
    for (column, alignment) in table.column_iter_mut().zip(&alignments) {
        column.set_cell_alignment(*alignment);
    }
    markdown_alignment(&table.to_string(), &alignments) + &notes(&rows)
}

/// The notes on subjects below the table.
fn notes(rows: &[&Row]) -> String {
    let mut notes: Vec<(&str, Vec<&str>)> = Vec::new();
    for row in rows {
        let Some(note) = &row.note else { continue };
        match notes.iter_mut().find(|(other, _)| other == note) {
            Some((_, subjects)) if subjects.contains(&row.subject.as_str()) => {}
            Some((_, subjects)) => subjects.push(&row.subject),
            None => notes.push((note, vec![&row.subject])),
        }
    }
    let lines = notes.iter().map(|(note, subjects)| format!("\n- {}: {note}", subjects.join(", ")));
    let text: String = lines.collect();
    if text.is_empty() { text } else { format!("\n{text}") }
}

/// The alignment line below the header.
fn markdown_alignment(table: &str, alignments: &[CellAlignment]) -> String {
    let mut lines: Vec<String> = table.lines().map(str::to_owned).collect();
    if let Some(rule) = lines.get_mut(1) {
        let cells: Vec<String> = rule
            .trim_matches('|')
            .split('|')
            .zip(alignments)
            .map(|(cell, alignment)| match alignment {
                CellAlignment::Right if cell.len() > 1 => format!("{}:", &cell[..cell.len() - 1]),
                _ => cell.to_owned(),
            })
            .collect();
        *rule = format!("|{}|", cells.join("|"));
    }
    lines.join("\n")
}

fn cells(rows: &[&Row], row: &Row) -> Vec<String> {
    let figures = &row.figures;
    let optional = |value: Option<f64>| value.map_or_else(String::new, number);
    vec![
        row.case.clone(),
        row.subject.clone(),
        row.durability.clone(),
        count(row.keys),
        row.buckets.map_or_else(String::new, |buckets| buckets.to_string()),
        row.threads.to_string(),
        row.batch.to_string(),
        figures.ops_per_s.map_or_else(String::new, rate),
        ratio(rows, row).map_or_else(String::new, |ratio| format!("{} ×", number(ratio))),
        optional(figures.p50_us),
        optional(figures.p99_us),
        optional(figures.p999_us),
        optional(figures.worst_us),
        optional(figures.cpu_us_per_key),
        optional(figures.ram_bytes_per_key),
        optional(figures.disk_bytes_per_key),
        optional(figures.write_amp),
        optional(figures.fsyncs_per_s),
    ]
}

/// The name of a figure with its unit.
fn spoken(name: &str) -> String {
    name.trim_end_matches("_per_s").replace("_percent", "_%").replace('_', " ")
}

fn figure(name: &str, value: f64) -> String {
    if name.ends_with("_per_s") { rate(value) } else { number(value) }
}

pub fn rate(per_s: f64) -> String {
    match per_s {
        1e6.. => format!("{} M/s", number(per_s / 1e6)),
        1e3.. => format!("{} k/s", number(per_s / 1e3)),
        _ => format!("{} /s", number(per_s)),
    }
}

pub fn count(keys: u64) -> String {
    match keys {
        1_000_000.. => format!("{} M", number(keys as f64 / 1e6)),
        1_000.. => format!("{} k", number(keys as f64 / 1e3)),
        _ => keys.to_string(),
    }
}

/// Three significant digits.
pub fn number(value: f64) -> String {
    let decimals = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        0.1.. => 2,
        0.0 => 0,
        _ => 4,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_that_say_something() {
        assert_eq!(number(1234.5), "1234");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(1.2), "1.2");
        assert_eq!(number(0.0042), "0.0042");
        assert_eq!(number(100.0), "100");
        assert_eq!(rate(4_300_000.0), "4.3 M/s");
    }
}
