//! The text formats in which metrics are written, and which one a scraper asks for.

use axum::http::{HeaderMap, header};

/// A text format for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The format of Prometheus before OpenMetrics, which every scraper reads:
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/>.
    Classic,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// Its media type.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The format that a request's `Accept` prefers: OpenMetrics where it is named and
    /// wanted no less than classic text, which is for all others.
    #[must_use]
    pub fn accepted_by(headers: &HeaderMap) -> Self {
        let (mut classic, mut open_metrics) = (0.0_f32, 0.0_f32);
        let values = headers.get_all(header::ACCEPT).into_iter();
        let values = values.filter_map(|value| value.to_str().ok());
        for range in values.flat_map(|value| value.split(',')) {
            let (kind, version, quality) = media_range(range);
            match (kind.as_str(), version) {
                ("application/openmetrics-text", None | Some("1.0.0")) => {
                    open_metrics = open_metrics.max(quality);
                }
                ("text/plain", None | Some("0.0.4")) | ("text/*" | "*/*", _) => {
                    classic = classic.max(quality);
                }
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= classic {
            Self::OpenMetrics
        } else {
            Self::Classic
        }
    }
}

/// Type, version and quality of a media range (RFC 9110, section 12.5.1).
fn media_range(range: &str) -> (String, Option<&str>, f32) {
    let mut parts = range.split(';').map(str::trim);
    let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
    let (mut version, mut quality) = (None, 1.0);
    for (key, value) in parts.filter_map(|part| part.split_once('=')) {
        match key.trim().to_ascii_lowercase().as_str() {
            "version" => version = Some(value.trim().trim_matches('"')),
            "q" => quality = value.trim().parse().unwrap_or(0.0),
            _ => {}
        }
    }
    (kind, version, quality)
}

/// What OpenMetrics text, without its end mark, is in classic text: there the name of a
/// counter has the suffix of its samples, and the library writes OpenMetrics alone.
pub(super) fn classic(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + open_metrics.len() / 16);
    let mut help = "";
    for line in open_metrics.lines() {
        let comment = line.strip_prefix("# ").and_then(|line| {
            let (key, rest) = line.split_once(' ')?;
            let (name, said) = rest.split_once(' ')?;
            Some((key, name, said))
        });
        match comment {
            // It comes before the type, without which the name isn't known.
            Some(("HELP", _, said)) => help = said,
            Some(("TYPE", name, kind)) => {
                let suffix = if kind == "counter" { "_total" } else { "" };
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
                text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
            }
            _ => text.extend([line, "\n"]),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(values: &[&'static str]) -> Format {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::ACCEPT, value.parse().unwrap());
        }
        Format::accepted_by(&headers)
    }

    #[test]
    fn scrapers_get_what_they_prefer_and_all_others_classic_text() {
        for values in [
            // Prometheus 2.5, 2.49, 3.0.
            "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;q=0.5,\
             application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "application/openmetrics-text",
            "APPLICATION/OpenMetrics-Text; Version=\"1.0.0\"; Q=0.1",
        ] {
            assert_eq!(accepted(&[values]), Format::OpenMetrics, "{values}");
        }
        for values in [
            "text/plain",
            "text/plain;version=0.0.4;q=0.5, application/openmetrics-text;q=0.4",
            // Scrapers that read protobuf or the first draft of OpenMetrics.
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;\
             encoding=delimited;q=0.7,text/plain;version=0.0.4;q=0.3",
            "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;q=0,*/*",
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "*/*",
            "",
            ";;=,",
            "application/openmetrics-text;q=x",
        ] {
            assert_eq!(accepted(&[values]), Format::Classic, "{values}");
        }
        assert_eq!(accepted(&[]), Format::Classic);
        let two = ["text/plain;q=0.5", "application/openmetrics-text"];
        assert_eq!(accepted(&two), Format::OpenMetrics);
    }

    #[test]
    fn counters_have_their_suffix_in_classic_text() {
        let open_metrics = "# HELP a_b All of it.\n# TYPE a_b counter\na_b_total{c=\"# x\"} 1\n\
                            # HELP d Now.\n# TYPE d gauge\nd 2\n";
        assert_eq!(
            classic(open_metrics),
            "# HELP a_b_total All of it.\n# TYPE a_b_total counter\na_b_total{c=\"# x\"} 1\n\
             # HELP d Now.\n# TYPE d gauge\nd 2\n"
        );
    }
}
