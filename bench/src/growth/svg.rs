//! Draws a plot as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::Plot;
use crate::unit::Unit;

const SIZE: (u32, u32) = (760, 380);
/// Colours that differ also for readers without colour vision.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 90, 181), RGBColor(220, 50, 32), RGBColor(0, 130, 90), RGBColor(120, 80, 160)];

/// Draws `plot`.
///
/// # Errors
/// If it has no point, or cannot be drawn.
pub fn draw(plot: &Plot) -> Result<String> {
    let mut out = String::new();
    render(plot, &mut out).map_err(|error| anyhow!("plot {}: {error}", plot.id))?;
    out.push('\n');
    Ok(out)
}

fn render(plot: &Plot, out: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let points = plot.curves.iter().flat_map(|curve| &curve.points).flatten();
    let most = points.map(|point| point.high).fold(0.0, f64::max);
    if most <= 0.0 {
        return Err("there is nothing to draw".into());
    }
    let last = u32::try_from(plot.steps.len().saturating_sub(1))?;
    let root = SVGBackend::with_string(out, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(&plot.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(84)
        // Half a step of margin on both sides.
        .build_cartesian_2d(-0.5..f64::from(last) + 0.5, 0.0..most * 1.15)?;
    let label = |x: &f64| {
        let at = (0..=last).find(|step| (f64::from(*step) - x).abs() < 0.01);
        at.and_then(|step| plot.steps.get(usize::try_from(step).ok()?)).cloned().unwrap_or_default()
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(plot.steps.len().saturating_mul(2))
        .x_label_formatter(&label)
        .y_labels(6)
        .y_label_formatter(&|y| plot.unit.show(*y))
        .x_desc(&plot.x)
        .y_desc(&plot.y)
        .label_style(("sans-serif", 13))
        .draw()?;
    for (curve, colour) in plot.curves.iter().zip(COLOURS.into_iter().cycle()) {
        let points: Vec<_> =
            (0_u32..).zip(&curve.points).filter_map(|(step, point)| Some((f64::from(step), (*point)?))).collect();
        let name = match plot.unit {
            Unit::PerTick => curve.who.clone(),
            _ => format!("{} ", curve.who),
        };
        let line = LineSeries::new(points.iter().map(|(x, point)| (*x, point.median)), colour.stroke_width(2));
        chart
            .draw_series(line)?
            .label(name.trim_end())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(points.iter().map(|(x, point)| Circle::new((*x, point.median), 3, colour.filled())))?;
        // Quartiles.
        let bars = points.iter().map(|(x, point)| PathElement::new([(*x, point.low), (*x, point.high)], colour));
        chart.draw_series(bars)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 13))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_is_an_svg_that_names_its_curves_and_steps() {
        let mut plot = Plot::new("p", "Title", "x", "y", Unit::Ns);
        plot.step("one", [("curve & more".to_owned(), vec![2.0, 4.0])]);
        plot.step("two", [("curve & more".to_owned(), vec![3.0])]);
        let svg = draw(&plot).unwrap();
        for part in ["<svg", "Title", "one", "two", "curve &amp; more"] {
            assert!(svg.contains(part), "{part} is not in {svg}");
        }
        assert!(svg.len() < 20_000);
        assert!(draw(&Plot::new("empty", "", "", "", Unit::Ns)).is_err());
    }
}
