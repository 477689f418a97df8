//! Pictures of what was found, as SVG on white ground.

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};

use crate::{
    measure::number,
    report::{Plot, Shape},
};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 860;
const BAR: u32 = 30;
const MARGINS: u32 = 110;
const LINES_HEIGHT: u32 = 420;
/// Of rowcache, then of the others; they differ in lightness, too.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 92, 175),
    RGBColor(230, 130, 0),
    RGBColor(0, 140, 100),
    RGBColor(180, 60, 140),
    RGBColor(110, 110, 110),
    RGBColor(90, 180, 230),
    RGBColor(150, 60, 20),
];

/// Draws it.
pub(crate) fn svg(plot: &Plot) -> Result<String> {
    let mut text = String::new();
    let height = match &plot.shape {
        Shape::Bars(bars) => MARGINS + BAR * bars.len() as u32,
        Shape::Lines { .. } => LINES_HEIGHT,
    };
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE).map_err(said)?;
        match &plot.shape {
            Shape::Bars(bars) => draw_bars(plot, bars, &area)?,
            Shape::Lines { x, log_x, lines } => draw_lines(plot, x, *log_x, lines, &area)?,
        }
        area.present().map_err(said)?;
    }
    Ok(text)
}

fn said(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot could not be drawn: {error}")
}

/// An axis in powers of ten is a linear one of logarithms.
#[derive(Clone, Copy)]
struct Axis {
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, log: bool) -> Self {
        let highest = values.clone().fold(f64::MIN, f64::max);
        if !log {
            return Self { log, from: 0.0, to: highest * 1.08 };
        }
        let lowest = values.filter(|&value| value > 0.0).fold(f64::MAX, f64::min);
        Self { log, from: lowest.log10().floor(), to: highest.log10() + 0.2 }
    }

    fn at(self, value: f64) -> f64 {
        if self.log { value.max(1e-12).log10().max(self.from) } else { value }
    }

    fn label(self, at: f64) -> String {
        if self.log && (at - at.round()).abs() > 0.01 {
            return String::new();
        }
        let text = number(if self.log { 10_f64.powf(at) } else { at });
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    }
}

fn draw_bars(plot: &Plot, bars: &[(String, f64)], area: &Area<'_>) -> Result<()> {
    let axis = Axis::over(bars.iter().map(|bar| bar.1), plot.log);
    let names = bars.iter().map(|bar| bar.0.chars().count()).max().unwrap_or(0) as u32;
    let mut chart = ChartBuilder::on(area)
        .caption(&plot.title, ("sans-serif", 18))
        .margin(12)
        .margin_right(60)
        .x_label_area_size(45)
        .y_label_area_size(20 + 8 * names)
        .build_cartesian_2d(axis.from..axis.to, (0..bars.len()).into_segmented())
        .map_err(said)?;
    // The first one is on top.
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(n) if *n < bars.len() => bars[bars.len() - 1 - n].0.clone(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(WHITE)
        .x_desc(&plot.unit)
        .x_label_formatter(&|at| axis.label(*at))
        .y_label_formatter(&name)
        .y_labels(bars.len() + 1)
        .label_style(("sans-serif", 14))
        .draw()
        .map_err(said)?;
    for (n, (name, value)) in bars.iter().rev().enumerate() {
        let colour = COLOURS[if name.contains("rowcache") { 0 } else { 4 }];
        let end = (axis.at(*value), SegmentValue::Exact(n + 1));
        let mut bar = Rectangle::new([(axis.from, SegmentValue::Exact(n)), end], colour.filled());
        bar.set_margin(4, 4, 0, 0);
        let tip = (axis.at(*value), SegmentValue::CenterOf(n));
        chart.draw_series([bar]).map_err(said)?;
        let label = EmptyElement::at(tip) + Text::new(number(*value), (5, -7), ("sans-serif", 13));
        chart.draw_series([label]).map_err(said)?;
    }
    Ok(())
}

fn draw_lines(plot: &Plot, x: &str, log_x: bool, lines: &[(String, Vec<(f64, f64)>)], area: &Area<'_>) -> Result<()> {
    let points = lines.iter().flat_map(|line| &line.1);
    let (across, up) = (Axis::over(points.clone().map(|at| at.0), log_x), Axis::over(points.map(|at| at.1), plot.log));
    let mut chart = ChartBuilder::on(area)
        .caption(&plot.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(45)
        .y_label_area_size(80)
        .build_cartesian_2d(across.from..across.to, up.from..up.to)
        .map_err(said)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(x)
        .y_desc(&plot.unit)
        .x_label_formatter(&|at| across.label(*at))
        .y_label_formatter(&|at| up.label(*at))
        .label_style(("sans-serif", 14))
        .draw()
        .map_err(said)?;
    for (n, (name, points)) in lines.iter().enumerate() {
        let style = COLOURS[n % COLOURS.len()].stroke_width(2);
        let at: Vec<(f64, f64)> = points.iter().map(|point| (across.at(point.0), up.at(point.1))).collect();
        chart.draw_series(at.iter().map(|&at| Circle::new(at, 3, style.filled()))).map_err(said)?;
        chart
            .draw_series(LineSeries::new(at, style))
            .map_err(said)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .position(emptiest(lines, across, up))
        .draw()
        .map_err(said)?;
    Ok(())
}

/// Where a legend lies over the least of these lines.
fn emptiest(lines: &[(String, Vec<(f64, f64)>)], across: Axis, up: Axis) -> SeriesLabelPosition {
    use SeriesLabelPosition::{
        LowerLeft, LowerMiddle, LowerRight, MiddleLeft, MiddleMiddle, MiddleRight, UpperLeft, UpperMiddle, UpperRight,
    };
    const PLACES: [[SeriesLabelPosition; 3]; 3] = [
        [UpperLeft, MiddleLeft, LowerLeft],
        [UpperMiddle, MiddleMiddle, LowerMiddle],
        [UpperRight, MiddleRight, LowerRight],
    ];
    let longest = lines.iter().map(|line| line.0.chars().count()).max().unwrap_or(0);
    // As shares of the area that the lines are drawn in.
    let width = (55.0 + 7.5 * longest as f64) / 750.0;
    let height = (10.0 + 20.0 * lines.len() as f64) / 320.0;
    let share = |axis: Axis, value: f64| (axis.at(value) - axis.from) / (axis.to - axis.from);
    let on_lines: Vec<(f64, f64)> = lines
        .iter()
        .flat_map(|line| line.1.windows(2))
        .flat_map(|ends| {
            let [from, to] = [ends[0], ends[1]].map(|at| (share(across, at.0), 1.0 - share(up, at.1)));
            (0..=100).map(move |n| {
                let part = f64::from(n) / 100.0;
                (from.0 + part * (to.0 - from.0), from.1 + part * (to.1 - from.1))
            })
        })
        .collect();
    let is_covered = |at: f64, from: f64, size: f64| at >= from && at <= from + size;
    let covered = |column: usize, row: usize| {
        let (x, y) = (column as f64 / 2.0 * (1.0 - width), row as f64 / 2.0 * (1.0 - height));
        on_lines.iter().filter(|at| is_covered(at.0, x, width) && is_covered(at.1, y, height)).count()
    };
    let places = (0..3).flat_map(|column| (0..3).map(move |row| (column, row)));
    let (column, row) = places.min_by_key(|&(column, row)| covered(column, row)).expect("nine");
    PLACES[column][row].clone()
}
