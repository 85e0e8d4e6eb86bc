//! Data in a page, as JSON in a `<script>`.

use maud::{Markup, PreEscaped, html};
use serde::Serialize;

/// Puts `data` where the page's script finds it.
///
/// A script's text ends at the first `</script`, whatever stands around it, and `<!--` changes how it is read; so no `<`
/// is left. JSON needs none: it can only stand in a string, where `\u003c` is the same.
pub(super) fn json(data: &impl Serialize) -> Markup {
    // What is serialized here has string keys and no failing implementation; an empty object draws nothing.
    let text = serde_json::to_string(data).unwrap_or_else(|_| "{}".to_owned());
    html! { script type="application/json" { (PreEscaped(text.replace('<', "\\u003c"))) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_ends_the_script() {
        let evil = "operator</script><b>&<!--\"";
        let Markup { 0: html } = json(&[evil]);
        let inner = html.strip_prefix("<script type=\"application/json\">").unwrap();
        let inner = inner.strip_suffix("</script>").unwrap();
        assert!(!inner.contains('<'), "{inner}");
        assert_eq!(serde_json::from_str::<Vec<String>>(inner).unwrap(), [evil]);
    }
}
