//! Columns as Docker's client sets them: at least ten wide, three spaces apart.

/// Least width of a column with its gap. docker/cli `formatter.go`: `tabwriter.NewWriter(…, 10, 1, 3, …)`.
const WIDTH_MIN: usize = 10;
/// Spaces between two columns at least.
const GAP: usize = 3;

/// Lines of cells as text; the last cell of a line is as wide as it is.
pub(crate) fn tabulate(lines: Vec<Vec<String>>) -> String {
    let n_columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count() + GAP).max().unwrap_or(0).max(WIDTH_MIN)
    };
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let start = text.len();
        for (cell, width) in line.iter().zip(&widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
        }
        text.truncate(text.trim_end_matches(' ').len().max(start));
        text.push('\n');
    }
    text
}
