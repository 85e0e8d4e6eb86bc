//! Data in a page, as JSON in a `<script>`.

use maud::{Markup, PreEscaped, html};
use serde::Serialize;

/// Puts `data` where the page's script finds it.
///
/// An HTML parser ends a script at the first `</script`, even inside a string, and `<!--` changes how it reads on. So
/// every `<` is escaped: in JSON it occurs in strings only, where `\u003c` means the same.
pub(super) fn json(data: &impl Serialize) -> Markup {
    // No type that is passed here can fail to serialize. If one could, the page would draw an empty object: nothing.
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
