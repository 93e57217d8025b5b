//! The part of Go's templates that Docker's users write, over JSON values.
//!
//! Fields (`{{.Node.Hostname}}`), functions (`{{json .}}`, `{{.Name | upper}}`,
//! `{{index .Labels "disk"}}`), `{{if}}…{{else}}…{{end}}` and `{{range}}…{{end}}`. It serves the
//! templates in services (`{{.Task.Slot}}`) and `--format`. A field that does not exist is an error
//! that names it, as in Docker. Source: Go's `text/template`; docker/cli `templates`.

use serde_json::Value;

/// Why a template cannot be read or filled in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is not a template.
    #[error("template parsing error at character {at}: {why}")]
    Parse {
        /// Counted from 1.
        at: usize,
        /// What is wrong.
        why: String,
    },
    /// A field that the value does not have.
    #[error("there is no field {field:?} (there are: {known})")]
    NoField {
        /// As written.
        field: String,
        /// What there is instead.
        known: String,
    },
    /// A function that got what it cannot use.
    #[error("{function}: {why}")]
    Call {
        /// Its name.
        function: String,
        /// What is wrong.
        why: String,
    },
}

/// Functions of one use of a template: `None` for a name that is none of them.
pub type Functions<'a> = &'a dyn Fn(&str, &[Value]) -> Option<Result<Value, Error>>;

/// A parsed template.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    nodes: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Text(String),
    Print(Pipeline),
    If { condition: Pipeline, then: Vec<Node>, otherwise: Vec<Node> },
    Range { over: Pipeline, body: Vec<Node>, otherwise: Vec<Node> },
}

/// Commands whose results feed the next one's last argument.
type Pipeline = Vec<Vec<Word>>;

#[derive(Debug, Clone, PartialEq)]
enum Word {
    Field(Vec<String>),
    Literal(Value),
    Name(String),
    Group(Pipeline),
}

impl Template {
    /// Reads a template.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut parser = Parser { pieces: pieces(text)?.into_iter().peekable() };
        let (nodes, end) = parser.nodes()?;
        match end {
            None => Ok(Self { nodes }),
            Some((at, word)) => Err(parse_error(at, format!("unexpected {{{{{word}}}}}"))),
        }
    }

    /// Fills it in with the fields of `value`.
    pub fn render(&self, value: &Value) -> Result<String, Error> {
        self.render_with(value, &|_, _| None)
    }

    /// The same with functions beside those that all templates have.
    pub fn render_with(&self, value: &Value, functions: Functions<'_>) -> Result<String, Error> {
        let mut text = String::new();
        render(&self.nodes, value, functions, &mut text)?;
        Ok(text)
    }

    /// The fields that it prints at its top level, as written and without the dot: `Node.Hostname`.
    pub fn fields(&self) -> Vec<String> {
        fn of(pipeline: &Pipeline, fields: &mut Vec<String>) {
            for word in pipeline.iter().flatten() {
                match word {
                    Word::Field(path) => fields.push(path.join(".")),
                    Word::Group(group) => of(group, fields),
                    Word::Literal(_) | Word::Name(_) => {}
                }
            }
        }
        let mut fields = Vec::new();
        for node in &self.nodes {
            if let Node::Print(pipeline) = node {
                of(pipeline, &mut fields);
            }
        }
        fields
    }
}

fn parse_error(at: usize, why: impl Into<String>) -> Error {
    Error::Parse { at, why: why.into() }
}

/// Text, or the inside of an action, with the character where it begins.
enum Piece {
    Text(String),
    Action(usize, String),
}

fn pieces(text: &str) -> Result<Vec<Piece>, Error> {
    let mut pieces = Vec::new();
    let (mut rest, mut at) = (text, 1);
    while let Some(begin) = rest.find("{{") {
        let (before, action) = rest.split_at(begin);
        let place = at + before.chars().count();
        let end = action_end(&action[2..]).ok_or_else(|| parse_error(place, "unclosed action"))?;
        let (mut before, mut inner) = (before, &action[2..2 + end]);
        let mut after = &action[2 + end + 2..];
        if let Some(trimmed) = inner.strip_prefix("- ") {
            (before, inner) = (before.trim_end(), trimmed);
        }
        if let Some(trimmed) = inner.strip_suffix(" -") {
            (after, inner) = (after.trim_start(), trimmed);
        }
        if !before.is_empty() {
            pieces.push(Piece::Text(before.to_owned()));
        }
        pieces.push(Piece::Action(place, inner.trim().to_owned()));
        at += rest.chars().count() - after.chars().count();
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    Ok(pieces)
}

/// Where the `}}` of an action is; those in strings do not count.
fn action_end(text: &str) -> Option<usize> {
    let mut quote = None;
    let mut previous = ' ';
    for (index, character) in text.char_indices() {
        match quote {
            Some(open) if character == open && previous != '\\' => quote = None,
            Some(_) => {}
            None if character == '"' || character == '`' => quote = Some(character),
            None if text[index..].starts_with("}}") => return Some(index),
            None => {}
        }
        previous = character;
    }
    None
}

struct Parser {
    pieces: std::iter::Peekable<std::vec::IntoIter<Piece>>,
}

/// `end` or `else` with its place.
type Terminator = Option<(usize, &'static str)>;

impl Parser {
    fn nodes(&mut self) -> Result<(Vec<Node>, Terminator), Error> {
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next() {
            let (at, action) = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Piece::Action(at, action) => (at, action),
            };
            let (keyword, rest) = action.split_once(char::is_whitespace).unwrap_or((&action, ""));
            match keyword {
                "end" => return Ok((nodes, Some((at, "end")))),
                "else" => return Ok((nodes, Some((at, "else")))),
                "if" => {
                    let condition = pipeline(rest, at)?;
                    let (then, otherwise) = self.branches(at)?;
                    nodes.push(Node::If { condition, then, otherwise });
                }
                "range" => {
                    let over = pipeline(rest, at)?;
                    let (body, otherwise) = self.branches(at)?;
                    nodes.push(Node::Range { over, body, otherwise });
                }
                comment if comment.starts_with("/*") => {}
                _ => nodes.push(Node::Print(pipeline(&action, at)?)),
            }
        }
        Ok((nodes, None))
    }

    fn branches(&mut self, at: usize) -> Result<(Vec<Node>, Vec<Node>), Error> {
        let unclosed = || parse_error(at, "{{end}} is missing");
        let (first, end) = self.nodes()?;
        if end.ok_or_else(unclosed)?.1 == "end" {
            return Ok((first, Vec::new()));
        }
        let (second, end) = self.nodes()?;
        match end {
            Some((_, "end")) => Ok((first, second)),
            _ => Err(unclosed()),
        }
    }
}

fn pipeline(text: &str, at: usize) -> Result<Pipeline, Error> {
    let mut characters = text.chars().peekable();
    let pipeline = commands(&mut characters, at, false)?;
    if pipeline.iter().any(Vec::is_empty) {
        return Err(parse_error(at, "missing value for command"));
    }
    Ok(pipeline)
}

type Characters<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn commands(characters: &mut Characters<'_>, at: usize, in_group: bool) -> Result<Pipeline, Error> {
    let mut pipeline: Pipeline = vec![Vec::new()];
    while let Some(character) = characters.next() {
        let word = match character {
            ' ' | '\t' | '\n' => continue,
            '|' => {
                pipeline.push(Vec::new());
                continue;
            }
            ')' if in_group => return Ok(pipeline),
            '(' => Word::Group(commands(characters, at, true)?),
            '"' => Word::Literal(Value::String(quoted(characters, at)?)),
            '`' => {
                let raw: String = characters.by_ref().take_while(|c| *c != '`').collect();
                Word::Literal(Value::String(raw))
            }
            '.' => {
                let path = take_while(characters, |c| !" \t\n|()".contains(c));
                let fields = path.split('.').filter(|field| !field.is_empty());
                Word::Field(fields.map(ToOwned::to_owned).collect())
            }
            '-' | '0'..='9' => {
                let digits =
                    format!("{character}{}", take_while(characters, |c| c.is_ascii_digit()));
                let number: i64 = digits
                    .parse()
                    .map_err(|_| parse_error(at, format!("bad number {digits:?}")))?;
                Word::Literal(number.into())
            }
            c if c.is_alphabetic() || c == '_' => {
                let rest = take_while(characters, |c| c.is_alphanumeric() || c == '_');
                match format!("{c}{rest}").as_str() {
                    "true" => Word::Literal(Value::Bool(true)),
                    "false" => Word::Literal(Value::Bool(false)),
                    name => Word::Name(name.to_owned()),
                }
            }
            other => return Err(parse_error(at, format!("unexpected {other:?} in an action"))),
        };
        pipeline.last_mut().expect("it begins with one command").push(word);
    }
    if in_group { Err(parse_error(at, "unclosed left parenthesis")) } else { Ok(pipeline) }
}

fn take_while(characters: &mut Characters<'_>, keep: impl Fn(char) -> bool) -> String {
    let mut text = String::new();
    while let Some(character) = characters.next_if(|character| keep(*character)) {
        text.push(character);
    }
    text
}

fn quoted(characters: &mut Characters<'_>, at: usize) -> Result<String, Error> {
    let mut text = String::new();
    while let Some(character) = characters.next() {
        match character {
            '"' => return Ok(text),
            '\\' => match characters.next() {
                Some('n') => text.push('\n'),
                Some('t') => text.push('\t'),
                Some(other) => text.push(other),
                None => break,
            },
            other => text.push(other),
        }
    }
    Err(parse_error(at, "unterminated quoted string"))
}

fn render(
    nodes: &[Node],
    value: &Value,
    functions: Functions<'_>,
    text: &mut String,
) -> Result<(), Error> {
    for node in nodes {
        match node {
            Node::Text(part) => text.push_str(part),
            Node::Print(pipeline) => {
                text.push_str(&display(&evaluate(pipeline, value, functions)?))
            }
            Node::If { condition, then, otherwise } => {
                let branch =
                    if is_true(&evaluate(condition, value, functions)?) { then } else { otherwise };
                render(branch, value, functions, text)?;
            }
            Node::Range { over, body, otherwise } => {
                let items: Vec<Value> = match evaluate(over, value, functions)? {
                    Value::Array(items) => items,
                    Value::Object(map) => map.into_iter().map(|(_, item)| item).collect(),
                    Value::Null => Vec::new(),
                    other => {
                        return Err(call_error("range", format!("can't iterate over {other}")));
                    }
                };
                if items.is_empty() {
                    render(otherwise, value, functions, text)?;
                }
                for item in &items {
                    render(body, item, functions, text)?;
                }
            }
        }
    }
    Ok(())
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(bool) => *bool,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As Go prints a value.
fn display(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(display).collect::<Vec<_>>().join(" "))
        }
        Value::Object(map) => {
            let entries = map.iter().map(|(key, item)| format!("{key}:{}", display(item)));
            format!("map[{}]", entries.collect::<Vec<_>>().join(" "))
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

fn evaluate(pipeline: &Pipeline, value: &Value, functions: Functions<'_>) -> Result<Value, Error> {
    let mut piped = None;
    for command in pipeline {
        piped = Some(run(command, piped, value, functions)?);
    }
    Ok(piped.unwrap_or(Value::Null))
}

fn run(
    command: &[Word],
    piped: Option<Value>,
    value: &Value,
    functions: Functions<'_>,
) -> Result<Value, Error> {
    let Some((first, rest)) = command.split_first() else { return Ok(Value::Null) };
    if let Word::Name(name) = first {
        let arguments = rest.iter().map(|word| argument(word, value, functions));
        let mut arguments = arguments.collect::<Result<Vec<_>, _>>()?;
        arguments.extend(piped);
        return call(name, &arguments, functions);
    }
    if rest.is_empty() && piped.is_none() {
        return argument(first, value, functions);
    }
    Err(call_error("template", "a value that is no function was given arguments"))
}

fn argument(word: &Word, value: &Value, functions: Functions<'_>) -> Result<Value, Error> {
    match word {
        Word::Literal(literal) => Ok(literal.clone()),
        Word::Group(pipeline) => evaluate(pipeline, value, functions),
        Word::Name(name) => call(name, &[], functions),
        Word::Field(path) => {
            let mut found = value;
            for (depth, field) in path.iter().enumerate() {
                found = match found {
                    Value::Object(map) => map.get(field).ok_or_else(|| {
                        let known: Vec<String> = map.keys().map(|key| format!(".{key}")).collect();
                        Error::NoField {
                            field: format!(".{}", path[..=depth].join(".")),
                            known: known.join(" "),
                        }
                    })?,
                    _ => return Err(no_field(&path[..=depth])),
                };
            }
            Ok(found.clone())
        }
    }
}

fn no_field(path: &[String]) -> Error {
    Error::NoField { field: format!(".{}", path.join(".")), known: "none".to_owned() }
}

fn call_error(function: &str, why: impl Into<String>) -> Error {
    Error::Call { function: function.to_owned(), why: why.into() }
}

fn call(name: &str, arguments: &[Value], functions: Functions<'_>) -> Result<Value, Error> {
    if let Some(result) = functions(name, arguments) {
        return result;
    }
    let text = |value: &Value| display(value);
    let wrong = || call_error(name, format!("wrong number of arguments: {}", arguments.len()));
    let result = match (name, arguments) {
        ("json", [value]) => value.to_string(),
        ("upper", [value]) => text(value).to_uppercase(),
        ("lower", [value]) => text(value).to_lowercase(),
        ("title", [value]) => {
            let text = text(value);
            let mut characters = text.chars();
            characters
                .next()
                .map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
        }
        ("print", values) => values.iter().map(text).collect(),
        ("println", values) => {
            format!("{}\n", values.iter().map(text).collect::<Vec<_>>().join(" "))
        }
        ("join", [Value::Array(items), separator]) => {
            items.iter().map(text).collect::<Vec<_>>().join(&text(separator))
        }
        ("split", [value, separator]) => {
            let (value, separator) = (text(value), text(separator));
            let parts = value.split(&separator).map(|part| Value::String(part.to_owned()));
            return Ok(Value::Array(parts.collect()));
        }
        ("len", [Value::Array(items)]) => return Ok(items.len().into()),
        ("len", [Value::Object(map)]) => return Ok(map.len().into()),
        ("len", [Value::String(text)]) => return Ok(text.len().into()),
        ("index", [Value::Object(map), key]) => {
            return Ok(map.get(&text(key)).cloned().unwrap_or_else(|| String::new().into()));
        }
        ("index", [Value::Array(items), Value::Number(index)]) => {
            let index = index.as_u64().and_then(|index| usize::try_from(index).ok());
            let item = index.and_then(|index| items.get(index)).cloned();
            return item.ok_or_else(|| call_error(name, "index out of range"));
        }
        ("eq", [left, right]) => return Ok(Value::Bool(left == right)),
        ("ne", [left, right]) => return Ok(Value::Bool(left != right)),
        ("not", [value]) => return Ok(Value::Bool(!is_true(value))),
        (
            "json" | "upper" | "lower" | "title" | "join" | "split" | "len" | "index" | "eq" | "ne"
            | "not",
            _,
        ) => return Err(wrong()),
        _ => return Err(call_error(name, "there is no such function")),
    };
    Ok(Value::String(result))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(template: &str, expect: &str) {
        let value = json!({
            "Name": "web", "Slot": 3, "Up": true, "None": null, "Labels": {"disk": "ssd", "row": "a"},
            "Ports": ["80", "81"], "Node": {"Hostname": "n1"},
        });
        let rendered = Template::parse(template).and_then(|template| template.render(&value));
        let rendered = rendered.unwrap_or_else(|error| format!("error: {error}"));
        assert_eq!(rendered, expect, "{template}");
    }

    #[test]
    fn templates_render_as_in_docker() {
        for (template, expect) in [
            ("plain", "plain"),
            ("{{.Name}}.{{.Slot}}", "web.3"),
            ("{{ .Node.Hostname }}!", "n1!"),
            ("{{.None}}", "<no value>"),
            ("{{json .Ports}}", r#"["80","81"]"#),
            ("{{.Name | upper | json}}", r#""WEB""#),
            (r#"{{index .Labels "disk"}}{{index .Labels "nosuch"}}"#, "ssd"),
            (r#"{{join .Ports ", "}}"#, "80, 81"),
            ("{{.Labels}}", "map[disk:ssd row:a]"),
            ("{{.Ports}}", "[80 81]"),
            ("{{if .Up}}up{{else}}down{{end}}", "up"),
            ("{{if not .Up}}up{{else}}down{{end}}", "down"),
            ("{{range .Ports}}<{{.}}>{{end}}", "<80><81>"),
            ("{{range .None}}x{{else}}none{{end}}", "none"),
            (r#"{{if eq .Name "web"}}yes{{end}}"#, "yes"),
            (r#"{{(index .Ports 1) | title}}"#, "81"),
            (r#"a {{- "}}" -}} b"#, "a}}b"),
            (r#"{{println "a" 1}}"#, "a 1\n"),
            ("{{len .Ports}}", "2"),
            ("{{/* nothing */}}x", "x"),
        ] {
            check(template, expect);
        }
    }

    #[test]
    fn a_use_has_functions_of_its_own() {
        let functions = |name: &str, arguments: &[Value]| match (name, arguments) {
            ("env", [Value::String(name)]) => Some(Ok(format!("<{name}>").into())),
            _ => None,
        };
        let render = |text: &str| {
            let template = Template::parse(text)?;
            template.render_with(&json!({"Names": ["a", "b"]}), &functions)
        };
        assert_eq!(render(r#"{{env "A" | lower}}"#).as_deref(), Ok("<a>"));
        assert_eq!(render("{{range .Names}}{{env .}}{{end}}").as_deref(), Ok("<a><b>"));
        assert_eq!(
            render("{{nosuch}}").unwrap_err().to_string(),
            "nosuch: there is no such function"
        );
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (template, expect) in [
            (
                "{{.Nam}}",
                "error: there is no field \".Nam\" (there are: .Labels .Name .Node .None .Ports .Slot .Up)",
            ),
            ("{{.Name.X}}", "error: there is no field \".Name.X\" (there are: none)"),
            ("a {{.Name", "error: template parsing error at character 3: unclosed action"),
            ("{{end}}", "error: template parsing error at character 1: unexpected {{end}}"),
            ("{{if .Up}}", "error: template parsing error at character 1: {{end}} is missing"),
            ("{{nosuch .Name}}", "error: nosuch: there is no such function"),
            ("{{}}", "error: template parsing error at character 1: missing value for command"),
            ("{{upper}}", "error: upper: wrong number of arguments: 0"),
        ] {
            check(template, expect);
        }
    }
}
