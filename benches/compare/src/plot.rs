//! Plots in SVG.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::table::{count, number, rate};

const BACKGROUND: RGBColor = RGBColor(255, 255, 255);
const OURS: RGBColor = RGBColor(0xc2, 0x41, 0x0c);
const PEER: RGBColor = RGBColor(0x94, 0xa3, 0xb8);
const LINES: [RGBColor; 4] = [OURS, RGBColor(0x1d, 0x4e, 0xd8), RGBColor(0x15, 0x80, 0x3d), RGBColor(0x7e, 0x22, 0xce)];
const FONT: &str = "sans-serif";
const TITLE: u32 = 20;

/// A bar per subject, labelled with its rate.
pub fn bars(path: &Path, title: &str, bars: &[(String, f64)]) -> Result<()> {
    // Space for the rate after the longest bar.
    let most = bars.iter().map(|(_, value)| *value).fold(1.0, f64::max) * 1.2;
    let height = 70 + 30 * u32::try_from(bars.len())?;
    let root = SVGBackend::new(path, (760, height)).into_drawing_area();
    root.fill(&BACKGROUND).map_err(failed)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, TITLE))
        .margin(8)
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, 200)
        .build_cartesian_2d(0.0..most, 0.0..bars.len() as f64)
        .map_err(failed)?;
    for (number, (subject, value)) in bars.iter().enumerate() {
        let top = (bars.len() - number) as f64;
        let color = if subject.starts_with("onlyonce") { OURS } else { PEER };
        let bar = Rectangle::new([(0.0, top - 0.82), (*value, top - 0.18)], color.filled());
        chart.draw_series([bar]).map_err(failed)?;
        let middle = Pos::new(HPos::Left, VPos::Center);
        let text = TextStyle::from((FONT, 15)).pos(middle);
        chart
            .draw_series([Text::new(rate(*value), (value + most * 0.008, top - 0.5), text.clone())])
            .map_err(failed)?;
        // The name of the subject is left of its bar.
        let (_, y) = chart.backend_coord(&(0.0, top - 0.5));
        root.draw(&Text::new(subject.clone(), (14, y), text)).map_err(failed)?;
    }
    root.present().map_err(failed)
}

/// A named line of a plot.
pub struct Line {
    pub name: String,
    pub points: Vec<[f64; 2]>,
}

/// The labels and scales of the axes.
pub struct Axes<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    /// A logarithmic x axis.
    pub is_x_log: bool,
}

pub fn lines(path: &Path, axes: &Axes, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    // Plots the logarithms, and labels them as powers of ten.
    let x_of = |x: f64| if axes.is_x_log { x.max(1.0).log10() } else { x };
    let (x_least, x_most) = points()
        .map(|[x, _]| x_of(*x))
        .fold(None, |range: Option<(f64, f64)>, x| Some(range.map_or((x, x), |(low, high)| (low.min(x), high.max(x)))))
        .context("a plot without points")?;
    let y_most = points().map(|[_, y]| *y).fold(0.0, f64::max).max(1e-9) * 1.15;
    let root = SVGBackend::new(path, (760, 300)).into_drawing_area();
    root.fill(&BACKGROUND).map_err(failed)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(axes.title, (FONT, TITLE))
        .margin(8)
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, 60)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(x_least..x_most.max(x_least + 1e-9), 0.0..y_most)
        .map_err(failed)?;
    let x_label = |x: &f64| {
        let x = if axes.is_x_log { 10f64.powf(*x) } else { *x };
        if axes.is_x_log { count(x as u64) } else { number(x) }
    };
    chart
        .configure_mesh()
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_label_formatter(&x_label)
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(0xe2, 0xe8, 0xf0))
        .draw()
        .map_err(failed)?;
    for (number, line) in lines.iter().enumerate() {
        let color = LINES[number % LINES.len()];
        let points = line.points.iter().map(|[x, y]| (x_of(*x), *y));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))
            .map_err(failed)?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(2)));
    }
    if lines.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(BACKGROUND.mix(0.8))
            .border_style(RGBColor(0xe2, 0xe8, 0xf0))
            .draw()
            .map_err(failed)?;
    }
    root.present().map_err(failed)
}

fn failed<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> anyhow::Error {
    anyhow!("cannot draw a plot: {error}")
}
