//! How things are written for people: tables, keys, numbers.

use std::time::Duration;

use crate::{KeyHash, RowKey, Rows};

/// Columns as wide as their widest cell, two spaces apart. The first row is the head.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The rows of a change: `all`, or the keys; of many only those that fit into `width` characters, and how many they are.
pub(crate) fn rows(rows: &Rows, width: usize) -> String {
    match rows {
        Rows::All => "all".to_owned(),
        Rows::Keys(keys) => self::keys(keys, keys.len(), width),
        Rows::Hashed { hashes, .. } => self::hashes(hashes, hashes.len(), width),
    }
}

/// The hashes at hand out of `count`, each by its first digits: enough to see that two are the same.
pub(crate) fn hashes(hashes: &[KeyHash], count: usize, width: usize) -> String {
    list(hashes.iter().map(|hash| format!("#{:.8}", hash.to_string())), count, width)
}

/// The keys at hand out of `count`.
pub(crate) fn keys(keys: &[RowKey], count: usize, width: usize) -> String {
    list(keys.iter().map(ToString::to_string), count, width)
}

fn list(keys: impl Iterator<Item = String>, count: usize, width: usize) -> String {
    let mut text = String::new();
    for (n, key) in keys.enumerate() {
        let separator = if n == 0 { "" } else { ", " };
        let rest = if n + 1 < count { format!(" … ({count} keys)").chars().count() } else { 0 };
        let used = text.chars().count() + separator.len() + key.chars().count();
        if n > 0 && used + rest > width {
            break;
        }
        text.push_str(separator);
        // One long key is cut, never left out.
        text.extend(key.chars().take(width));
        if n + 1 == count {
            return text;
        }
    }
    format!("{text} … ({count} keys)")
}

/// `0.84`; `-` if it is not known.
pub(crate) fn millis(latency: Option<Duration>) -> String {
    latency.map_or_else(|| "-".to_owned(), |latency| format!("{:.2}", latency.as_secs_f64() * 1000.0))
}

/// `1,234,567`.
pub(crate) fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KeyPart;

    #[test]
    fn many_keys_are_shortened_and_counted() {
        let keys: Vec<_> = (0..100).map(|n| RowKey::new(&[KeyPart::Int(n)])).collect();
        assert_eq!(rows(&Rows::All, 40), "all");
        assert_eq!(rows(&Rows::Keys(keys[..1].to_vec()), 1), "0");
        assert_eq!(rows(&Rows::Keys(keys[..3].to_vec()), 40), "0, 1, 2");
        let text = rows(&Rows::Keys(keys), 30);
        assert_eq!(text, "0, 1, 2, 3, 4, 5 … (100 keys)");
    }

    #[test]
    fn a_long_key_is_cut() {
        let key = RowKey::new(&[KeyPart::Text("x".repeat(500).into())]);
        assert_eq!(rows(&Rows::Keys(vec![key]), 20).chars().count(), 20);
    }

    #[test]
    fn thousands_are_set_apart() {
        let cases = [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")];
        for (n, text) in cases {
            assert_eq!(number(n), text);
        }
    }

    #[test]
    fn cells_are_aligned() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        assert_eq!(table(&[row(&["a", "bcd"]), row(&["long", "x"])]), "a     bcd\nlong  x\n");
    }
}
