//! The page at `/`, for browsers: files that are part of the program, and the headers that
//! keep a browser from doing anything else with this address.

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// What a browser may load: the page's own files and answers. No markup that got into the page
/// could run, send or embed anything, and no other page may embed this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
     require-trusted-types-for 'script'; trusted-types 'none'";

/// Headers of every answer.
const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

const HTML: &str = include_str!("page/index.html");

/// Other files of the page: path, type and content.
const FILES: [(&str, &str, &str); 3] = [
    (
        "/page.js",
        "text/javascript; charset=utf-8",
        include_str!("page/page.js"),
    ),
    (
        "/page.css",
        "text/css; charset=utf-8",
        include_str!("page/page.css"),
    ),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];

/// The page and its files. Who does not ask for HTML gets `index`.
pub(super) fn routes<S: Clone + Send + Sync + 'static>(index: &'static str) -> Router<S> {
    let root = move |headers: HeaderMap| async move {
        let vary = (header::VARY, "accept");
        if accepts_html(&headers) {
            let html = (header::CONTENT_TYPE, "text/html; charset=utf-8");
            return ([html, vary], HTML).into_response();
        }
        ([vary], index).into_response()
    };
    let routes = Router::new().route("/", get(root));
    FILES
        .into_iter()
        .fold(routes, |routes, (path, kind, text)| {
            let answer = ([(header::CONTENT_TYPE, kind)], text);
            routes.route(path, get(move || async move { answer }))
        })
}

/// Whether a browser asks, rather than `curl`, which takes everything.
fn accepts_html(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter();
    let mut accepted = accepted.filter_map(|accept| accept.to_str().ok());
    accepted.any(|accept| accept.contains("text/html"))
}

/// Adds the headers.
pub(super) async fn protect(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in HEADERS {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    response
}
