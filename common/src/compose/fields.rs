//! Reads typed values out of the tree; what does not fit is reported with its line and left out.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::Report;
use super::tree::{Entries, Key, Node, Value, number_text};
use super::units::{ParseError, parse_bytes, parse_cpus, parse_duration, split_words};
use crate::spec::Nanos;

/// A mapping of the document whose keys are known in advance.
#[derive(Debug, Clone)]
pub(super) struct Section<'a> {
    entries: &'a [(Key, Node)],
    /// Whose it is: `service web`.
    owner: String,
    /// Path to it: empty, or `deploy.resources.`.
    prefix: String,
}

/// The value of a known key.
#[derive(Debug, Clone)]
pub(super) struct Field<'a> {
    pub(super) node: &'a Node,
    /// `service web: key 'deploy.replicas'`.
    pub(super) name: String,
    owner: String,
    path: String,
}

impl<'a> Section<'a> {
    /// The mapping `node`; anything else is reported and reads as empty.
    pub(super) fn new(owner: String, prefix: String, node: &'a Node, report: &mut Report) -> Self {
        let entries = match &node.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            other => {
                let name = name(&owner, prefix.trim_end_matches('.'));
                report
                    .error(node.at, format!("{name} must be a mapping, not {}", other.describe()));
                &[]
            }
        };
        Self { entries, owner, prefix }
    }

    /// Reports every key that is neither `known` (an error) nor supported (a warning).
    pub(super) fn check(&self, known: &[&str], unsupported: &[&str], report: &mut Report) {
        for (key, _) in self.entries {
            let word = key.name.as_str();
            if known.contains(&word) || word.starts_with("x-") {
                continue;
            }
            let name = name(&self.owner, &format!("{}{word}", self.prefix));
            if unsupported.contains(&word) {
                report.warn(key.at, format!("{name} is not supported yet and is ignored"));
                continue;
            }
            let candidates = known.iter().chain(unsupported).copied();
            let advice = match nearest(word, candidates) {
                Some(near) => format!("did you mean '{near}'?"),
                None => "remove it, or check its spelling and indentation".into(),
            };
            report.error(key.at, format!("{name} is unknown; {advice}"));
        }
    }

    /// The value of `key`, unless it is absent or empty.
    pub(super) fn get(&self, key: &str) -> Option<Field<'a>> {
        let (_, node) = self.entries.iter().find(|(entry, _)| entry.name == key)?;
        if node.value == Value::Null {
            return None;
        }
        let path = format!("{}{key}", self.prefix);
        Some(Field { node, name: name(&self.owner, &path), owner: self.owner.clone(), path })
    }
}

fn name(owner: &str, path: &str) -> String {
    match (owner, path) {
        ("", path) => format!("key '{path}'"),
        (owner, "") => owner.to_owned(),
        (owner, path) => format!("{owner}: key '{path}'"),
    }
}

impl<'a> Field<'a> {
    /// A field of no name, for looking at a value without reporting on it.
    pub(super) fn unnamed(node: &'a Node) -> Self {
        Self { node, name: String::new(), owner: String::new(), path: String::new() }
    }

    /// The mapping below this key.
    pub(super) fn section(&self, report: &mut Report) -> Section<'a> {
        Section::new(self.owner.clone(), format!("{}.", self.path), self.node, report)
    }

    /// Reports that the value is not what it should be.
    pub(super) fn refuse(&self, expected: &str, report: &mut Report) {
        self.refuse_node(self.node, expected, report);
    }

    fn refuse_node(&self, node: &Node, expected: &str, report: &mut Report) {
        let given = node.value.describe();
        report.error(node.at, format!("{} must be {expected}, not {given}", self.name));
    }

    /// A text; a number or boolean wants quotes, so that it stays as written.
    pub(super) fn text(&self, report: &mut Report) -> Option<String> {
        self.text_of(self.node, report)
    }

    fn text_of(&self, node: &Node, report: &mut Report) -> Option<String> {
        match &node.value {
            Value::Text(text) => Some(text.clone()),
            Value::Int(_) | Value::Float(_) | Value::Bool(_) => {
                self.refuse_node(node, "a text; put it in quotes", report);
                None
            }
            Value::Null | Value::List(_) | Value::Map(_) => {
                self.refuse_node(node, "a text", report);
                None
            }
        }
    }

    /// One of a few words.
    pub(super) fn word(&self, words: &[&str], report: &mut Report) -> Option<String> {
        let text = self.text(report)?;
        if words.contains(&text.as_str()) {
            return Some(text);
        }
        let mut message =
            format!("{} must be one of {}, not {text:?}", self.name, words.join(", "));
        if let Some(near) = nearest(&text, words.iter().copied()) {
            message.push_str(&format!("; did you mean '{near}'?"));
        }
        report.error(self.node.at, message);
        None
    }

    /// A whole number.
    pub(super) fn number<T: FromStr + TryFrom<i128>>(&self, report: &mut Report) -> Option<T> {
        let value = match &self.node.value {
            Value::Int(number) => T::try_from(*number).ok(),
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        if value.is_none() {
            self.refuse("a whole number in range, for example 3", report);
        }
        value
    }

    /// A number between 0 and 1.
    pub(super) fn ratio(&self, report: &mut Report) -> Option<f64> {
        let value = match &self.node.value {
            Value::Int(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        let value = value.filter(|value| (0.0..=1.0).contains(value));
        if value.is_none() {
            self.refuse("a number between 0 and 1, for example 0.2", report);
        }
        value
    }

    /// True or false; `yes`, `no`, `on` and `off` count, as in Docker's client.
    pub(super) fn boolean(&self, report: &mut Report) -> Option<bool> {
        let value = match &self.node.value {
            Value::Bool(value) => Some(*value),
            Value::Text(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" | "y" => Some(true),
                "false" | "no" | "off" | "n" => Some(false),
                _ => None,
            },
            _ => None,
        };
        if value.is_none() {
            self.refuse("true or false", report);
        }
        value
    }

    /// A text or number that `parse` reads.
    fn parsed<T>(
        &self,
        parse: fn(&str) -> Result<T, ParseError>,
        report: &mut Report,
    ) -> Option<T> {
        let text = match &self.node.value {
            Value::Text(text) => text.clone(),
            Value::Int(number) => number.to_string(),
            Value::Float(number) => number_text(*number),
            Value::Null | Value::Bool(_) | Value::List(_) | Value::Map(_) => String::new(),
        };
        match parse(&text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.refuse(error.expected, report);
                None
            }
        }
    }

    /// `1m30s`.
    pub(super) fn duration(&self, report: &mut Report) -> Option<Nanos> {
        self.parsed(parse_duration, report)
    }

    /// `64M`.
    pub(super) fn bytes(&self, report: &mut Report) -> Option<i64> {
        self.parsed(parse_bytes, report)
    }

    /// `0.5` processors, in nano-CPUs.
    pub(super) fn cpus(&self, report: &mut Report) -> Option<i64> {
        self.parsed(parse_cpus, report)
    }

    /// The items of a list.
    pub(super) fn items(&self, report: &mut Report) -> &'a [Node] {
        match &self.node.value {
            Value::List(items) => items,
            _ => {
                self.refuse("a list", report);
                &[]
            }
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self, report: &mut Report) -> Vec<String> {
        let items = self.items(report);
        items.iter().filter_map(|item| self.text_of(item, report)).collect()
    }

    /// A list of words, or one text that is split as a shell splits it.
    pub(super) fn command(&self, report: &mut Report) -> Option<Vec<String>> {
        match &self.node.value {
            Value::Text(_) => self.parsed(split_words, report),
            Value::List(items) => {
                Some(items.iter().filter_map(|item| self.scalar(item, report)).collect())
            }
            _ => {
                self.refuse("a text or a list of texts", report);
                None
            }
        }
    }

    /// The text of a scalar, a number as Docker's client writes it.
    fn scalar(&self, node: &Node, report: &mut Report) -> Option<String> {
        match &node.value {
            Value::Text(text) => Some(text.clone()),
            Value::Int(number) => Some(number.to_string()),
            Value::Float(number) => Some(number_text(*number)),
            Value::Bool(_) | Value::Null | Value::List(_) | Value::Map(_) => {
                self.refuse_node(
                    node,
                    "made of texts and numbers; put other values in quotes",
                    report,
                );
                None
            }
        }
    }

    /// A mapping, or a list of `NAME=VALUE`; a name without value reads as `None`.
    pub(super) fn pairs(&self, report: &mut Report) -> BTreeMap<String, Option<String>> {
        let mut pairs = BTreeMap::new();
        match &self.node.value {
            Value::Map(entries) => {
                for (key, node) in entries {
                    let value = match &node.value {
                        Value::Null => None,
                        Value::Bool(value) => {
                            let name = &self.name;
                            report.error(
                                node.at,
                                format!(
                                    "{name}: {} is the boolean {value}; put it in quotes",
                                    key.name
                                ),
                            );
                            continue;
                        }
                        _ => match self.scalar(node, report) {
                            Some(value) => Some(value),
                            None => continue,
                        },
                    };
                    pairs.insert(key.name.clone(), value);
                }
            }
            Value::List(items) => {
                for text in items.iter().filter_map(|item| self.scalar(item, report)) {
                    match text.split_once('=') {
                        Some((name, value)) => pairs.insert(name.into(), Some(value.into())),
                        None => pairs.insert(text, None),
                    };
                }
            }
            _ => self.refuse("a mapping or a list of NAME=VALUE", report),
        }
        pairs
    }

    /// The entries of a mapping.
    pub(super) fn entries(&self, report: &mut Report) -> &'a [(Key, Node)] {
        static NONE: Entries = Vec::new();
        match &self.node.value {
            Value::Map(entries) => entries,
            _ => {
                self.refuse("a mapping", report);
                &NONE
            }
        }
    }

    /// The field of one entry of this mapping.
    pub(super) fn entry(&self, key: &Key, node: &'a Node) -> Field<'a> {
        let path = format!("{}.{}", self.path, key.name);
        Field { node, name: name(&self.owner, &path), owner: self.owner.clone(), path }
    }

    /// The field of one item of this list, under the list's name.
    pub(super) fn item(&self, node: &'a Node) -> Field<'a> {
        Field { node, ..self.clone() }
    }
}

/// The candidate that `word` most likely stands for, if one is near.
pub(super) fn nearest<'c>(
    word: &str,
    candidates: impl Iterator<Item = &'c str>,
) -> Option<&'c str> {
    let bound = (word.chars().count() / 3).clamp(1, 2);
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= bound)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_misses_are_recognised() {
        let keys = ["image", "ports", "environment", "user", "init"];
        for (word, expect) in [
            ("imgae", Some("image")),
            ("port", Some("ports")),
            ("enviroment", Some("environment")),
            ("enviornmetn", Some("environment")),
            ("usr", Some("user")),
            ("colour", None),
        ] {
            assert_eq!(nearest(word, keys.into_iter()), expect, "{word}");
        }
    }
}
