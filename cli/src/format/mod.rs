//! Rows of values as a table, as JSON lines or through a template.
//!
//! Every list of the client is a [`View`] (which columns, which fields) and rows of JSON objects
//! whose keys are Docker's field names. `--format` chooses: nothing is the table, `json` is an object
//! a line, `table …` is a table of a template's cells, anything else is a template a line.
//! Source: docker/cli `cli/command/formatter`.

pub(crate) mod human;
mod table;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value};
use skep_common::template::Template;

pub(crate) use table::tabulate;

/// One column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    /// Its heading.
    pub(crate) header: &'static str,
    /// The field that it shows.
    pub(crate) field: &'static str,
    /// Whether the plain table shows it; a template may use it in any case.
    pub(crate) is_shown: bool,
}

/// A column of the plain table.
pub(crate) const fn shown(header: &'static str, field: &'static str) -> Column {
    Column { header, field, is_shown: true }
}

/// A field that only templates and JSON show.
pub(crate) const fn hidden(header: &'static str, field: &'static str) -> Column {
    Column { header, field, is_shown: false }
}

/// How a kind of row is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Its columns in order.
    pub(crate) columns: &'static [Column],
    /// Changes a field's text in the plain table only.
    pub(crate) cell: fn(field: &str, row: &Value) -> String,
}

/// A row's field as text: the default of [`View::cell`].
pub(crate) fn plain_cell(field: &str, row: &Value) -> String {
    match &row[field] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Renders rows; `quiet` shows the field `ID` alone.
pub(crate) fn render(
    view: &View,
    rows: &[Value],
    format: Option<&str>,
    quiet: bool,
) -> Result<String> {
    let lines = |texts: Vec<String>| texts.into_iter().map(|text| text + "\n").collect::<String>();
    match format.unwrap_or("table") {
        "table" | "" if quiet => Ok(lines(rows.iter().map(|row| plain_cell("ID", row)).collect())),
        "table" | "" => Ok(plain_table(view, rows)),
        "json" => Ok(lines(rows.iter().map(|row| fields(view, row).to_string()).collect())),
        format => match format.strip_prefix("table ") {
            Some(cells) => templated_table(view, rows, cells),
            None => {
                rows.iter().map(|row| Ok(templated(format, &fields(view, row))? + "\n")).collect()
            }
        },
    }
}

fn plain_table(view: &View, rows: &[Value]) -> String {
    let columns = || view.columns.iter().filter(|column| column.is_shown);
    let header = columns().map(|column| column.header.to_owned()).collect();
    let cells = |row| columns().map(|column| (view.cell)(column.field, row)).collect();
    tabulate(std::iter::once(header).chain(rows.iter().map(cells)).collect())
}

/// The fields of the view alone, so that what a cell needs besides does not become an interface.
fn fields(view: &View, row: &Value) -> Value {
    let pairs =
        view.columns.iter().map(|column| (column.field.to_owned(), row[column.field].clone()));
    Value::Object(pairs.collect::<Map<_, _>>())
}

fn templated_table(view: &View, rows: &[Value], cells: &str) -> Result<String> {
    let header = view.columns.iter().map(|column| (column.field.to_owned(), column.header.into()));
    let header = Value::Object(header.collect());
    let line = |row: Value| {
        let text = templated(cells, &row)?;
        Ok(text.split('\t').map(str::to_owned).collect::<Vec<String>>())
    };
    let rows = rows.iter().map(|row| fields(view, row));
    Ok(tabulate(std::iter::once(header).chain(rows).map(line).collect::<Result<_>>()?))
}

/// One value through a template, in which `\t` and `\n` may be written as two characters.
pub(crate) fn templated(template: &str, value: &Value) -> Result<String> {
    let text = template.replace("\\t", "\t").replace("\\n", "\n");
    let parsed = Template::parse(&text)
        .with_context(|| format!("template parsing error in {template:?}"))?;
    parsed.render(value).with_context(|| format!("template {template:?} does not fit"))
}

/// The documents of an `inspect`: an indented array, a compact one, or a template a document.
pub(crate) fn inspect(documents: &[Value], format: Option<&str>) -> Result<String> {
    match format {
        None | Some("") => {
            let mut text = Vec::new();
            let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
            let mut serializer = serde_json::Serializer::with_formatter(&mut text, indent);
            serde::Serialize::serialize(documents, &mut serializer)?;
            Ok(String::from_utf8(text)? + "\n")
        }
        Some("json") => Ok(serde_json::to_string(documents)? + "\n"),
        Some(template) => documents
            .iter()
            .map(|value| templated(template, value).map(|text| text + "\n"))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const VIEW: View = View {
        columns: &[shown("ID", "ID"), shown("NAME", "Name"), hidden("SELF", "Self")],
        cell: plain_cell,
    };

    #[test]
    fn rows_in_every_format() {
        let rows = [
            json!({"ID": "abc", "Name": "a-rather-long-name", "Self": true, "extra": 1}),
            json!({"ID": "de", "Name": "b", "Self": false}),
        ];
        for (format, quiet, expect) in [
            (None, false, "ID        NAME\nabc       a-rather-long-name\nde        b\n"),
            (Some("table"), false, "ID        NAME\nabc       a-rather-long-name\nde        b\n"),
            (None, true, "abc\nde\n"),
            (
                Some("json"),
                false,
                "{\"ID\":\"abc\",\"Name\":\"a-rather-long-name\",\"Self\":true}\n{\"ID\":\"de\",\"Name\":\"b\",\"Self\":false}\n",
            ),
            (Some("{{.Name}}:{{.ID}}"), false, "a-rather-long-name:abc\nb:de\n"),
            (
                Some(r"table {{.Name}}\t{{.Self}}"),
                false,
                "NAME                 SELF\na-rather-long-name   true\nb                    false\n",
            ),
        ] {
            assert_eq!(render(&VIEW, &rows, format, quiet).unwrap(), expect, "{format:?}");
        }
        assert!(render(&VIEW, &rows, Some("{{.Name"), false).is_err());
    }

    #[test]
    fn documents() {
        let documents = [json!({"ID": "a", "Spec": {"Name": "n"}})];
        let pretty = "[\n    {\n        \"ID\": \"a\",\n        \"Spec\": {\n            \"Name\": \"n\"\n        }\n    }\n]\n";
        assert_eq!(inspect(&documents, None).unwrap(), pretty);
        assert_eq!(
            inspect(&documents, Some("json")).unwrap(),
            "[{\"ID\":\"a\",\"Spec\":{\"Name\":\"n\"}}]\n"
        );
        assert_eq!(inspect(&documents, Some("{{.Spec.Name}}")).unwrap(), "n\n");
    }
}
