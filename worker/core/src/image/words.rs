//! Splits and expands the words of a Dockerfile instruction.
//!
//! Source: buildkit `frontend/dockerfile/parser/line_parsers.go` (`parseWords`) and
//! `frontend/dockerfile/shell/lex.go`, without its pattern operators (`${name#pattern}`).

use std::iter::Peekable;
use std::str::Chars;

/// Splits at white space outside of quotes; quotes and backslashes stay in the words.
pub(super) fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            continue;
        }
        word.push(c);
        match (c, quote) {
            // Between single quotes a backslash is a backslash.
            ('\\', None | Some('"')) => word.extend(chars.next()),
            ('"' | '\'', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            _ => {}
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Why a word cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Error {
    /// The closing quote is missing.
    #[error("quote {0} is not closed")]
    Quote(char),
    /// `${` without a name, a closing brace or an operator among `:-`, `-`, `:+`, `+`.
    #[error("variable \"${{{0}\" is not of the form ${{NAME}}, ${{NAME:-word}} or ${{NAME:+word}}")]
    Variable(String),
}

/// Removes quotes and backslashes, and puts in the values of `$NAME` and `${NAME}`.
pub(super) fn expand(word: &str, env: &[String]) -> Result<String, Error> {
    let mut out = String::new();
    let mut chars = word.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.push(chars.next().unwrap_or('\\')),
            '\'' => loop {
                match chars.next() {
                    Some('\'') => break,
                    Some(c) => out.push(c),
                    None => return Err(Error::Quote('\'')),
                }
            },
            '"' => expand_quoted(&mut chars, env, &mut out)?,
            '$' => out.push_str(&variable(&mut chars, env)?),
            c => out.push(c),
        }
    }
    Ok(out)
}

fn expand_quoted(
    chars: &mut Peekable<Chars<'_>>,
    env: &[String],
    out: &mut String,
) -> Result<(), Error> {
    loop {
        match chars.next() {
            Some('"') => return Ok(()),
            Some('$') => out.push_str(&variable(chars, env)?),
            Some('\\') => match chars.next() {
                Some(c @ ('"' | '$' | '\\')) => out.push(c),
                Some(c) => out.extend(['\\', c]),
                None => return Err(Error::Quote('"')),
            },
            Some(c) => out.push(c),
            None => return Err(Error::Quote('"')),
        }
    }
}

fn variable(chars: &mut Peekable<Chars<'_>>, env: &[String]) -> Result<String, Error> {
    if chars.peek() != Some(&'{') {
        let name = name(chars);
        // A dollar sign that begins no name is itself.
        return Ok(if name.is_empty() { "$".to_owned() } else { value(env, &name).to_owned() });
    }
    chars.next();
    let name = name(chars);
    let mut operator = String::new();
    while let Some(c) = chars.next_if(|c| matches!(c, ':' | '-' | '+') && operator.len() < 2) {
        operator.push(c);
        if c != ':' {
            break;
        }
    }
    let mut word = String::new();
    let mut depth = 1;
    for c in chars.by_ref() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if depth == 0 {
            break;
        }
        word.push(c);
    }
    let current = value(env, &name);
    let is_set = env.iter().any(|pair| pair.split_once('=').is_some_and(|(key, _)| key == name));
    let refused = || Error::Variable(format!("{name}{operator}{word}"));
    if name.is_empty() || depth != 0 {
        return Err(refused());
    }
    match operator.as_str() {
        "" if word.is_empty() => Ok(current.to_owned()),
        ":-" if current.is_empty() => expand(&word, env),
        "-" if !is_set => expand(&word, env),
        ":-" | "-" => Ok(current.to_owned()),
        ":+" if current.is_empty() => Ok(String::new()),
        "+" if !is_set => Ok(String::new()),
        ":+" | "+" => expand(&word, env),
        _ => Err(refused()),
    }
}

fn name(chars: &mut Peekable<Chars<'_>>) -> String {
    let mut name = String::new();
    while let Some(c) = chars.next_if(|c| {
        c.is_ascii_alphabetic() || *c == '_' || (!name.is_empty() && c.is_ascii_digit())
    }) {
        name.push(c);
    }
    name
}

fn value<'a>(env: &'a [String], name: &str) -> &'a str {
    let pairs = env.iter().filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next_back().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_end_at_white_space_outside_of_quotes() {
        for (line, expect) in [
            ("a=1  b=2", vec!["a=1", "b=2"]),
            (r#"a="x y" b='p q' c=r\ s"#, vec![r#"a="x y""#, "b='p q'", r"c=r\ s"]),
            (r#"a="x\" y""#, vec![r#"a="x\" y""#]),
            ("  ", vec![]),
        ] {
            assert_eq!(split(line), expect, "{line}");
        }
    }

    #[test]
    fn quotes_go_and_variables_come() {
        let env = ["A=1".to_owned(), "EMPTY=".to_owned(), "A=2".to_owned()];
        for (word, expect) in [
            ("$A-${A}", "2-2"),
            ("'$A'", "$A"),
            (r#""$A \$A \n""#, r"2 $A \n"),
            (r"\$A", "$A"),
            ("$ $", "$ $"),
            ("${NO:-x$A}${EMPTY-y}${EMPTY:-z}", "x2z"),
            ("${A:+set}${EMPTY:+set}${EMPTY+is}", "setis"),
        ] {
            assert_eq!(expand(word, &env).as_deref(), Ok(expect), "{word}");
        }
        for (word, reason) in [
            ("\"x", "quote \" is not closed"),
            ("'x", "quote ' is not closed"),
            ("${A", "is not of the form"),
            ("${A#x}", "is not of the form"),
            ("${}", "is not of the form"),
        ] {
            let error = expand(word, &env).unwrap_err().to_string();
            assert!(error.contains(reason), "{word}: {error}");
        }
    }
}
