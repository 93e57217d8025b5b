//! Lays the tree of a later file over that of an earlier one.
//!
//! Mappings merge key by key and the later value wins; `environment`, labels and `sysctls` merge as
//! mappings however they are written; commands and health tests are replaced; a port takes the place
//! of the one with the same published number; other lists are appended.
//! Source: docker/cli `cli/compose/loader/merge.go`, which merges typed structs by the same rules;
//! differs where that appends to a health check's test.

use super::tree::{Entries, Key, Node, Value};
use super::{Report, published};

/// Lists that are whole: the later one replaces the earlier one.
const REPLACED: &[&str] = &["command", "entrypoint", "test"];
/// Lists of `NAME=VALUE` that merge as mappings.
const PAIRS: &[&str] = &["environment", "labels", "sysctls"];

/// Lays `over` over `base`.
pub(super) fn merge(base: &mut Node, over: Node, report: &mut Report) {
    merge_at("", base, over, report);
}

fn merge_at(key: &str, base: &mut Node, mut over: Node, report: &mut Report) {
    if PAIRS.contains(&key) {
        pairs_to_map(base);
        pairs_to_map(&mut over);
    }
    if over.value == Value::Null {
        return;
    }
    match (&mut base.value, over.value) {
        (Value::Map(entries), Value::Map(later)) => {
            for (key, node) in later {
                match entries.iter_mut().find(|(entry, _)| entry.name == key.name) {
                    Some((entry, value)) => {
                        merge_at(&entry.name, value, node, report);
                    }
                    None => entries.push((key, node)),
                }
            }
        }
        (Value::List(items), Value::List(later)) if key == "ports" => {
            let taken: Vec<_> = later.iter().flat_map(published::numbers).collect();
            items.retain(|item| {
                let numbers = published::numbers(item);
                numbers.is_empty() || !numbers.iter().all(|number| taken.contains(number))
            });
            items.extend(later);
        }
        (Value::List(items), Value::List(later)) if !REPLACED.contains(&key) => items.extend(later),
        (earlier @ (Value::Map(_) | Value::List(_)), later @ (Value::Map(_) | Value::List(_)))
            if std::mem::discriminant(earlier) != std::mem::discriminant(&later) =>
        {
            let message = format!(
                "key '{key}' is {} here and {} in an earlier file; write both alike",
                later.describe(),
                earlier.describe()
            );
            report.error(over.at, message);
        }
        (_, later) => *base = Node { value: later, at: over.at },
    }
}

/// A list of `NAME=VALUE` as a mapping; anything else stays, for the reader to refuse.
fn pairs_to_map(node: &mut Node) {
    let Value::List(items) = &node.value else { return };
    let mut entries: Entries = Vec::new();
    for item in items {
        let Value::Text(text) = &item.value else { return };
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Value::Text(value.into())),
            None => (text.as_str(), Value::Null),
        };
        entries.retain(|(key, _)| key.name != name);
        entries.push((Key { name: name.into(), at: item.at }, Node { value, at: item.at }));
    }
    node.value = Value::Map(entries);
}
