//! The two cookies of a browser session (`contracts/run-gateway.md` section 3.2): its secret, which scripts cannot read,
//! and its CSRF token, which they must. Over https they bear the `__Host-` prefix, so that no other site of the domain
//! and no plain page can set them; the contract's names are for this machine only, where a browser sends nothing
//! over the network. Over any other plain connection there are no sessions.

use cookie::{Cookie, SameSite};
use http::header::{COOKIE, SET_COOKIE};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::client::Client;
use super::error::{ApiError, ErrorCode};
use super::guard::host_name;

/// Where clients without a cookie store send the secret.
const SESSION_HEADER: HeaderName = HeaderName::from_static("x-abstractgateway-session");

/// What the cookies are called, and whether they may leave this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    session: &'static str,
    csrf: &'static str,
    is_secure: bool,
}

const HTTPS: Names = Names {
    session: "__Host-rungate_session",
    csrf: "__Host-rungate_csrf",
    is_secure: true,
};

const LOOPBACK: Names = Names {
    session: "abstractgateway_session",
    csrf: "abstractgateway_csrf",
    is_secure: false,
};

/// Those of the connection that a request came by.
pub fn names(client: Client, headers: &HeaderMap) -> Result<Names, ApiError> {
    let host = host_name(headers).unwrap_or_default();
    let is_loopback = matches!(host.as_str(), "localhost" | "127.0.0.1" | "[::1]");
    match (client.is_https, is_loopback) {
        (true, _) => Ok(HTTPS),
        (false, true) => Ok(LOOPBACK),
        (false, false) => Err(ApiError::new(
            ErrorCode::HttpsRequired,
            "Browser sessions need https, or the name localhost; behind a TLS proxy, set trusted_proxies",
        )),
    }
}

/// The secret that a request shows: by header, or by cookie; where there are sessions.
pub fn secret(client: Client, headers: &HeaderMap) -> Option<String> {
    let names = names(client, headers).ok()?;
    if let Some(shown) = headers.get(SESSION_HEADER) {
        return shown.to_str().ok().map(str::to_owned);
    }
    named(headers, names.session)
}

/// The value of a cookie. Of two of the same name somebody else may have set one: then none counts.
fn named(headers: &HeaderMap, name: &str) -> Option<String> {
    let mut found = None;
    for line in headers.get_all(COOKIE) {
        let cookies = Cookie::split_parse(line.to_str().ok()?);
        for cookie in cookies.flatten().filter(|cookie| cookie.name() == name) {
            if found.is_some() {
                return None;
            }
            found = Some(cookie.value().to_owned());
        }
    }
    found
}

/// Sets both; they outlive the browser only with `max_age_ms`.
pub fn set(
    headers: &mut HeaderMap,
    names: Names,
    secret: &str,
    csrf: &str,
    max_age_ms: Option<u64>,
) {
    put(headers, names, names.session, secret, max_age_ms);
    put(headers, names, names.csrf, csrf, max_age_ms);
}

/// Takes both away.
pub fn clear(headers: &mut HeaderMap, names: Names) {
    put(headers, names, names.session, "", Some(0));
    put(headers, names, names.csrf, "", Some(0));
}

fn put(headers: &mut HeaderMap, of: Names, name: &str, value: &str, max_age_ms: Option<u64>) {
    let mut cookie = Cookie::build((name, value))
        .path("/")
        .same_site(SameSite::Lax)
        .secure(of.is_secure)
        .http_only(name == of.session)
        .build();
    let seconds = max_age_ms.map(|ms| i64::try_from(ms / 1_000).unwrap_or(i64::MAX));
    cookie.set_max_age(seconds.map(time::Duration::seconds));
    if let Ok(value) = HeaderValue::from_str(&cookie.to_string()) {
        headers.append(SET_COOKIE, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(is_https: bool) -> Client {
        let address = std::net::IpAddr::from([127, 0, 0, 1]);
        Client { address, is_https }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn shown(is_https: bool, pairs: &[(&'static str, &str)]) -> Option<String> {
        secret(client(is_https), &headers(pairs))
    }

    #[test]
    fn the_connection_says_which_cookies_count() {
        let host = ("host", "localhost:8080");
        let plain = ("cookie", "a=b; abstractgateway_session=s1; c=d");
        let secure = ("cookie", "__Host-rungate_session=s2");
        assert_eq!(shown(false, &[host, plain, secure]).unwrap(), "s1");
        assert_eq!(shown(true, &[host, plain, secure]).unwrap(), "s2");
        assert_eq!(shown(true, &[host, plain]), None);
        assert_eq!(shown(false, &[("host", "gpu.example"), plain]), None);
        let header = ("x-abstractgateway-session", "s3");
        assert_eq!(shown(false, &[host, plain, header]).unwrap(), "s3");
        assert_eq!(
            shown(true, &[("host", "gpu.example"), header]).unwrap(),
            "s3"
        );
        assert_eq!(shown(false, &[("host", "gpu.example"), header]), None);
    }

    #[test]
    fn of_two_cookies_of_a_name_none_counts() {
        let host = ("host", "127.0.0.1");
        let twice = "abstractgateway_session=s1; abstractgateway_session=s2";
        assert_eq!(shown(false, &[host, ("cookie", twice)]), None);
        let one = ("cookie", "abstractgateway_session=s1");
        assert_eq!(shown(false, &[host, one, one]), None);
    }

    #[test]
    fn cookies_are_written_as_the_baseline_says() {
        let mut written = HeaderMap::new();
        set(&mut written, HTTPS, "s", "c", Some(90_000));
        set(&mut written, LOOPBACK, "s", "c", None);
        clear(&mut written, HTTPS);
        let lines: Vec<&str> = written
            .get_all(SET_COOKIE)
            .iter()
            .map(|line| line.to_str().unwrap())
            .collect();
        assert_eq!(
            lines,
            [
                "__Host-rungate_session=s; HttpOnly; SameSite=Lax; Secure; Path=/; Max-Age=90",
                "__Host-rungate_csrf=c; SameSite=Lax; Secure; Path=/; Max-Age=90",
                "abstractgateway_session=s; HttpOnly; SameSite=Lax; Path=/",
                "abstractgateway_csrf=c; SameSite=Lax; Path=/",
                "__Host-rungate_session=; HttpOnly; SameSite=Lax; Secure; Path=/; Max-Age=0",
                "__Host-rungate_csrf=; SameSite=Lax; Secure; Path=/; Max-Age=0",
            ]
        );
    }
}
