//! Puts the caller's variables into a document: `$VAR`, `${VAR}` and its operators, `$$`.
//!
//! Source: docker/cli `cli/compose/template`. Differs from it: `${VAR:+x}` and `${VAR+x}` exist, and
//! the word after an operator may hold variables itself, both as in the Compose specification.

use std::collections::BTreeMap;

use super::Report;
use super::tree::{Node, Value};

/// Replaces the variables in every text below `node`.
pub(super) fn apply(node: &mut Node, environment: &BTreeMap<String, String>, report: &mut Report) {
    match &mut node.value {
        Value::Text(text) if text.contains('$') => {
            let mut unset = Vec::new();
            match substitute(text, environment, &mut unset) {
                Ok(replaced) => *text = replaced,
                Err(message) => report.error(node.at, message),
            }
            for name in unset {
                report.warn(node.at, format!("variable {name} is not set; an empty text is used"));
            }
        }
        Value::List(items) => items.iter_mut().for_each(|item| apply(item, environment, report)),
        Value::Map(entries) => {
            entries.iter_mut().for_each(|(_, value)| apply(value, environment, report));
        }
        Value::Text(_) | Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {}
    }
}

/// Replaces the variables of one text; names without value and default are added to `unset`.
fn substitute(
    text: &str,
    environment: &BTreeMap<String, String>,
    unset: &mut Vec<String>,
) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('$') {
        out.push_str(&rest[..start]);
        rest = &rest[start + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let end = closing_brace(after).ok_or_else(|| invalid(text))?;
            out.push_str(&braced(text, &after[..end], environment, unset)?);
            rest = &after[end + 1..];
        } else {
            let length = name_length(rest);
            if length == 0 {
                return Err(invalid(text));
            }
            let name = &rest[..length];
            match environment.get(name) {
                Some(value) => out.push_str(value),
                None => unset.push(name.to_owned()),
            }
            rest = &rest[length..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn invalid(text: &str) -> String {
    format!("{text:?} is not a valid use of variables; write ${{NAME}}, or $$ for a dollar sign")
}

/// The value of what stands between the braces.
fn braced(
    text: &str,
    inner: &str,
    environment: &BTreeMap<String, String>,
    unset: &mut Vec<String>,
) -> Result<String, String> {
    let (name, operation) = inner.split_at(name_length(inner));
    if name.is_empty() {
        return Err(invalid(text));
    }
    let (empty_is_unset, operation) = match operation.strip_prefix(':') {
        Some(operation) => (true, operation),
        None => (false, operation),
    };
    let value = environment.get(name).filter(|value| !empty_is_unset || !value.is_empty());
    let Some(operator) = operation.chars().next() else {
        if empty_is_unset {
            return Err(invalid(text));
        }
        if value.is_none() {
            unset.push(name.to_owned());
        }
        return Ok(value.cloned().unwrap_or_default());
    };
    let word = &operation[operator.len_utf8()..];
    match (operator, value) {
        ('-' | '?', Some(value)) => Ok(value.clone()),
        ('-', None) | ('+', Some(_)) => substitute(word, environment, unset),
        ('+', None) => Ok(String::new()),
        ('?', None) => {
            let word = substitute(word, environment, unset)?;
            Err(match word.as_str() {
                "" => format!("variable {name} is required; set it in the environment"),
                word => format!("variable {name} is required: {word}"),
            })
        }
        _ => Err(invalid(text)),
    }
}

fn name_length(text: &str) -> usize {
    if !text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        return 0;
    }
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len())
}

/// The position of the brace that closes the one before `text`.
fn closing_brace(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (index, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(index),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced() {
        let environment: BTreeMap<String, String> =
            [("A", "one"), ("E", ""), ("B_2", "two")].map(|(k, v)| (k.into(), v.into())).into();
        for (text, expect) in [
            ("$A-$B_2", Ok("one-two")),
            ("${A}${B_2}", Ok("onetwo")),
            ("$$A ${A}", Ok("$A one")),
            ("${X:-d} ${E:-d} ${E-d} ${A:-d}", Ok("d d  one")),
            ("${X-d}", Ok("d")),
            ("${X:-${A}}", Ok("one")),
            ("${A:+yes}${E:+no}${E+set}${X+no}", Ok("yesset")),
            ("[$X]", Ok("[] unset X")),
            ("[${X}]", Ok("[] unset X")),
            ("${A:?must}", Ok("one")),
            ("${X:?must be set}", Err("variable X is required: must be set")),
            ("${E:?}", Err("variable E is required; set it in the environment")),
            ("${E?}", Ok("")),
            ("${", Err("")),
            ("a $ b", Err("")),
            ("${A!x}", Err("")),
            ("${:-x}", Err("")),
        ] {
            let mut unset = Vec::new();
            let got = substitute(text, &environment, &mut unset).map(|value| {
                unset.iter().fold(value, |value, name| format!("{value} unset {name}"))
            });
            match expect {
                Err("") => {
                    assert!(got.unwrap_err().contains("is not a valid use of variables"), "{text}")
                }
                expect => assert_eq!(got.as_deref().map_err(String::as_str), expect, "{text}"),
            }
        }
    }
}
