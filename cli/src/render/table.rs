//! The hottest functions as a table for a terminal.

use std::fmt::Write as _;

use super::cell::{fit, fit_path, grouped, printable};
use super::profile::StackProfile;
use super::ranking::FunctionRow;
use crate::terminal::percent;

/// Below this many columns for names, places in the source are left out.
const MIN_COLUMNS_WITH_LOCATION: usize = 48;
/// The function column never gets narrower.
const MIN_FUNCTION_COLUMNS: usize = 16;
/// Between columns.
const GAP: &str = "  ";

/// The first `rows` functions by own samples, in lines of at most `width` characters (more only on a
/// terminal too narrow for the numbers and a short name).
pub(crate) fn table(profile: &StackProfile, rows: usize, width: usize) -> String {
    let samples = profile.samples();
    let functions = profile.functions();
    let shown = &functions[..rows.min(functions.len())];
    let number = |value: fn(&FunctionRow) -> u64, title: &str| {
        shown.iter().map(|row| grouped(value(row)).len()).max().unwrap_or(0).max(title.len())
    };
    let own_columns = number(|row| row.own, "self");
    let total_columns = number(|row| row.total, "total");
    let numbers = 6 + own_columns + 6 + total_columns + 4 * GAP.len();
    let names = width.saturating_sub(numbers).max(MIN_FUNCTION_COLUMNS);
    let (function_columns, location_columns) = share(names, shown);

    let mut text = String::new();
    let mut line =
        |own_percent: &str, own: &str, total_percent: &str, total: &str, function: &str, place: &str| {
            let function = fit(&printable(function), function_columns);
            let place = fit_path(&printable(place), location_columns);
            let numbers = format!(
                "{own_percent:>6}{GAP}{own:>own_columns$}{GAP}{total_percent:>6}{GAP}{total:>total_columns$}"
            );
            let line = format!("{numbers}{GAP}{function:<function_columns$}{GAP}{place}");
            writeln!(text, "{}", line.trim_end()).expect("writing to a string does not fail");
        };
    line("self%", "self", "total%", "total", "function", "file:line");
    for row in shown {
        line(
            &format!("{:.1}%", percent(row.own, samples)),
            &grouped(row.own),
            &format!("{:.1}%", percent(row.total, samples)),
            &grouped(row.total),
            &row.function,
            &location(row),
        );
    }
    text
}

/// `file:line`, or the image where the file is not known.
fn location(row: &FunctionRow) -> String {
    match (&row.file, row.line, &row.image) {
        (Some(file), Some(line), _) => format!("{file}:{line}"),
        (Some(file), None, _) => file.clone(),
        (None, _, Some(image)) => image.clone(),
        (None, _, None) => String::new(),
    }
}

/// Columns for the function and for its location: what they need where both fit, else two fifths for
/// the location and what is left over to the other.
fn share(columns: usize, rows: &[FunctionRow]) -> (usize, usize) {
    let longest = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0);
    let function = longest(&mut rows.iter().map(|row| row.function.chars().count())).max("function".len());
    let place = longest(&mut rows.iter().map(|row| location(row).chars().count())).max("file:line".len());
    if columns < MIN_COLUMNS_WITH_LOCATION {
        return (columns.min(function), 0);
    }
    let columns = columns - GAP.len();
    let place = place.min((columns * 2 / 5).max(columns.saturating_sub(function)));
    ((columns - place).min(function), place)
}
