//! A YAML document as an untyped tree in which every node knows its file and line.
//!
//! Scalars are read as Docker's client reads them: `yes` and `on` are texts, `0440` is octal.
//! Anchors and merge keys are resolved by the parser; a key given twice is refused by it.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Location, Spanned};

use super::{Pos, Problem};

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) at: Pos,
}

/// The key of a mapping's entry and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) at: Pos,
}

/// Entries of a mapping in the order of the file.
pub(super) type Entries = Vec<(Key, Node)>;

/// What YAML can say.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Entries),
}

impl Value {
    /// A value for people: `the text "x"`, `a list`.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "empty".into(),
            Self::Bool(value) => format!("the boolean {value}"),
            Self::Int(value) => format!("the number {value}"),
            Self::Float(value) => format!("the number {}", number_text(*value)),
            Self::Text(text) => format!("the text {text:?}"),
            Self::List(_) => "a list".into(),
            Self::Map(_) => "a mapping".into(),
        }
    }
}

/// A number as Docker's client writes it (Go's `%v`): shortest digits, an exponent from 1e21 on.
pub(super) fn number_text(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e21).contains(&magnitude) && magnitude.is_finite() {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').expect("`{:e}` writes an exponent");
        let (sign, number) = match exponent.strip_prefix('-') {
            Some(number) => ('-', number),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{number:0>2}");
    }
    format!("{value}")
}

/// Reads one file.
pub(super) fn parse(file: usize, text: &str) -> Result<Node, Problem> {
    if text.trim().is_empty() {
        return Ok(Node { value: Value::Null, at: Pos { file, line: 1 } });
    }
    let options = serde_saphyr::options! {
        strict_booleans: true,
        legacy_octal_numbers: true,
        duplicate_keys: DuplicateKeyPolicy::Error,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options) {
        Ok(raw) => Ok(node(file, raw)),
        Err(error) => {
            let line = error.location().map_or(1, |location| line_of(&location));
            let message = first_sentence(&error.without_snippet().to_string());
            Err(Problem { at: Pos { file, line }, message: format!("not valid YAML: {message}") })
        }
    }
}

/// The parser's message without its own line numbers, which the problem already has.
fn first_sentence(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let line = line.split(" at line ").next().unwrap_or(line);
    // The parser's advice is for its caller, not for the user.
    line.split(", set DuplicateKeyPolicy").next().unwrap_or(line).trim_end_matches('.').to_owned()
}

fn line_of(location: &Location) -> usize {
    usize::try_from(location.line()).unwrap_or(usize::MAX)
}

/// What the parser fills; `node` then moves the lines into the tree.
#[derive(Debug)]
enum Raw {
    Scalar(Value),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<Raw>, Spanned<Raw>)>),
}

fn node(file: usize, raw: Spanned<Raw>) -> Node {
    let at = Pos { file, line: line_of(&raw.defined).max(1) };
    let value = match raw.value {
        Raw::Scalar(value) => value,
        Raw::List(items) => Value::List(items.into_iter().map(|item| node(file, item)).collect()),
        Raw::Map(entries) => Value::Map(
            entries
                .into_iter()
                .map(|(key, value)| (self::key(file, key), node(file, value)))
                .collect(),
        ),
    };
    Node { value, at }
}

fn key(file: usize, raw: Spanned<Raw>) -> Key {
    let node = node(file, raw);
    let name = match node.value {
        Value::Text(text) => text,
        Value::Int(number) => number.to_string(),
        Value::Float(number) => number_text(number),
        Value::Bool(value) => value.to_string(),
        Value::Null => "null".into(),
        Value::List(_) | Value::Map(_) => "(not a name)".into(),
    };
    Key { name, at: node.at }
}

struct RawVisitor;

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        Raw::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Int(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Int(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Int(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Text(value.to_owned())))
    }

    fn visit_string<E>(self, value: String) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Text(value)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Raw::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Raw, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Raw::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One word per leaf: `path=value@line`.
    fn leaves(node: &Node, path: &str, out: &mut Vec<String>) {
        match &node.value {
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    leaves(item, &format!("{path}[{index}]"), out);
                }
            }
            Value::Map(entries) => {
                for (key, value) in entries {
                    leaves(value, &format!("{path}.{}", key.name), out);
                }
            }
            leaf => out.push(format!("{path}={}@{}", leaf.describe(), node.at.line)),
        }
    }

    #[test]
    fn scalars_keep_docker_s_meaning_and_their_line() {
        for (yaml, expect) in [
            (
                "a: yes\nb: on\nc: true",
                ".a=the text \"yes\"@1 .b=the text \"on\"@2 .c=the boolean true@3",
            ),
            (
                "a: 0440\nb: 0x1F\nc: '0440'",
                ".a=the number 288@1 .b=the number 31@2 .c=the text \"0440\"@3",
            ),
            (
                "a: 22:22\nb: 1.50\nc: 1e3\nd: ~\ne:",
                ".a=the text \"22:22\"@1 .b=the number 1.5@2 .c=the number 1000@3 .d=empty@4 .e=empty@5",
            ),
            (
                "a: &x {p: 1}\nb:\n  <<: *x\n  q: 2",
                ".a.p=the number 1@1 .b.q=the number 2@4 .b.p=the number 1@1",
            ),
            ("a: &x {p: 1}\nb:\n  <<: *x\n  p: 2", ".a.p=the number 1@1 .b.p=the number 2@4"),
            (
                "l:\n  - a\n  - &s b\n  - *s",
                ".l[0]=the text \"a\"@2 .l[1]=the text \"b\"@3 .l[2]=the text \"b\"@3",
            ),
            ("80: x", ".80=the text \"x\"@1"),
        ] {
            let mut out = Vec::new();
            leaves(&parse(0, yaml).unwrap(), "", &mut out);
            assert_eq!(out.join(" "), expect, "{yaml}");
        }
    }

    #[test]
    fn what_is_no_yaml_is_refused_with_its_line() {
        for (yaml, line, word) in [
            ("a: 1\na: 2\n", 2, "duplicate"),
            ("a:\n  b: [1\nc: 2\n", 3, ""),
            ("a: *nope\n", 1, "anchor"),
        ] {
            let problem = parse(0, yaml).unwrap_err();
            assert_eq!(problem.at.line, line, "{yaml}: {problem:?}");
            assert!(problem.message.contains(word), "{yaml}: {problem:?}");
            assert!(!problem.message.contains('\n'), "{problem:?}");
        }
    }
}
