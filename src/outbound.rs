//! The guarded HTTP client for addresses that strangers choose (callbacks): what it may reach is checked on
//! the very addresses it connects to, after name resolution, and redirects are not followed.
//! Sources: OWASP's SSRF prevention cheat sheet; IANA's special-purpose address registries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use url::{Host, Url};

/// The longest URL taken.
const URL_MAX_BYTES: usize = 2_048;
/// Longest time for one request, from resolving to the answer's head (`contracts/gpu-gateway.md` section 4).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Callbacks are rare and go many ways: few connections are worth keeping.
const IDLE_PER_HOST: usize = 1;

/// How far a guarded client may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Addresses of the public internet.
    Public,
    /// Those, and this machine and its private networks (setting `callback_allow_private`).
    PublicAndPrivate,
}

/// Why a URL or an address is refused. For the person who chose it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("it is no valid URL: {0}")]
    NoUrl(url::ParseError),
    #[error("it is longer than {URL_MAX_BYTES} bytes")]
    TooLong,
    #[error("its scheme is '{0}'; only http and https are called")]
    Scheme(String),
    #[error("it names no host")]
    NoHost,
    #[error("it holds a user name or a password, which would be kept in the ledger")]
    Credentials,
    #[error(
        "{0} is never called: it is a link-local, metadata, multicast or otherwise special address"
    )]
    Special(String),
    #[error(
        "{0} is private; private addresses are called only if the setting callback_allow_private is true"
    )]
    Private(String),
}

/// What can be told of a URL without resolving its name: everything but where the name leads.
pub fn check_url(text: &str, reach: Reach) -> Result<Url, Refused> {
    if text.len() > URL_MAX_BYTES {
        return Err(Refused::TooLong);
    }
    let url = Url::parse(text).map_err(Refused::NoUrl)?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(Refused::Scheme(url.scheme().to_owned()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Refused::Credentials);
    }
    // The parser has turned every spelling of an IPv4 address (decimal, octal, hexadecimal, short) into one.
    match url.host().ok_or(Refused::NoHost)? {
        Host::Ipv4(address) => check_address(IpAddr::V4(address), reach)?,
        Host::Ipv6(address) => check_address(IpAddr::V6(address), reach)?,
        Host::Domain(name) => {
            let name = name.trim_end_matches('.');
            let local = name == "localhost" || name.ends_with(".localhost");
            if local && reach == Reach::Public {
                return Err(Refused::Private(name.to_owned()));
            }
        }
    }
    Ok(url)
}

/// Whether an address may be connected to. One that wraps an IPv4 address is judged as that.
pub fn check_address(address: IpAddr, reach: Reach) -> Result<(), Refused> {
    let kind = match address {
        IpAddr::V4(address) => kind_v4(address),
        IpAddr::V6(address) => kind_v6(address),
    };
    match (kind, reach) {
        (Kind::Public, _) | (Kind::Private, Reach::PublicAndPrivate) => Ok(()),
        (Kind::Private, Reach::Public) => Err(Refused::Private(address.to_string())),
        (Kind::Special, _) => Err(Refused::Special(address.to_string())),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Public,
    /// This machine and private networks.
    Private,
    /// Nothing that a callback has any business with.
    Special,
}

fn kind_v4(address: Ipv4Addr) -> Kind {
    match address.octets() {
        [127 | 10, ..] | [192, 168, ..] => Kind::Private,
        [172, second, ..] if second & 0xf0 == 16 => Kind::Private,
        // This network; link-local with the clouds' metadata; shared (CGNAT) space.
        [0, ..] | [169, 254, ..] => Kind::Special,
        [100, second, ..] if second & 0xc0 == 64 => Kind::Special,
        // Protocol assignments (Oracle's metadata among them), 6to4 relays, benchmarks, documentation.
        [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [198, 18 | 19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _] => Kind::Special,
        // Azure's metadata lies at a public address.
        [168, 63, 129, 16] => Kind::Special,
        // Multicast, reserved, broadcast.
        [224..=255, ..] => Kind::Special,
        _ => Kind::Public,
    }
}

fn kind_v6(address: Ipv6Addr) -> Kind {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        kind_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        [0, 0, 0, 0, 0, 0, 0, 1] => Kind::Private,
        // Mapped, translated and compatible IPv4, and the unspecified address.
        [0, 0, 0, 0, 0, 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0, 0, 0, 0, 0, 0, high, low] => embedded(high, low),
        // NAT64 and 6to4 lead to the IPv4 address in them.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => embedded(high, low),
        // Amazon's metadata, in the middle of the private range.
        [0xfd00, 0x0ec2, ..] => Kind::Special,
        [first, ..] if first & 0xfe00 == 0xfc00 => Kind::Private,
        // Documentation; Teredo and other protocol assignments.
        [0x2001, 0x0db8, ..] => Kind::Special,
        [0x2001, second, ..] if second < 0x200 => Kind::Special,
        // All that is global is in 2000::/3; what is left is link-local, site-local, multicast, discard or unassigned.
        [first, ..] if first & 0xe000 == 0x2000 => Kind::Public,
        _ => Kind::Special,
    }
}

/// An HTTP client that connects only within its reach.
#[derive(Clone, Debug)]
pub struct GuardedClient {
    client: reqwest::Client,
    reach: Reach,
}

impl GuardedClient {
    /// Fails when the system's TLS roots cannot be used.
    pub fn new(reach: Reach) -> Result<GuardedClient, reqwest::Error> {
        let client = reqwest::Client::builder()
            // A proxy would connect in our place, unchecked.
            .no_proxy()
            .redirect(Policy::none())
            .timeout(REQUEST_TIMEOUT)
            .pool_max_idle_per_host(IDLE_PER_HOST)
            .user_agent(concat!("rungate/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(std::sync::Arc::new(GuardedResolver { reach }))
            .build()?;
        Ok(GuardedClient { client, reach })
    }

    /// A POST to `url`. Checks addresses written as such here, since the connector asks no resolver for them, and
    /// names when connecting.
    pub fn post(&self, url: &str) -> Result<reqwest::RequestBuilder, Refused> {
        Ok(self.client.post(check_url(url, self.reach)?))
    }

    /// A GET of `url`, checked alike.
    pub fn get(&self, url: &str) -> Result<reqwest::RequestBuilder, Refused> {
        Ok(self.client.get(check_url(url, self.reach)?))
    }
}

/// Resolves names to those of their addresses that are within reach. The connector uses these very addresses, so
/// that a name which changes between check and use gains nothing.
struct GuardedResolver {
    reach: Reach,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.reach;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            Ok(within_reach(found, reach)?)
        })
    }
}

fn within_reach(found: impl Iterator<Item = SocketAddr>, reach: Reach) -> Result<Addrs, Refused> {
    let mut allowed = Vec::new();
    let mut refused = None;
    for address in found {
        match check_address(address.ip(), reach) {
            Ok(()) => allowed.push(address),
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) if allowed.is_empty() => Err(error),
        _ => Ok(Box::new(allowed.into_iter())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str, reach: Reach) -> Option<&'static str> {
        match check_url(url, reach) {
            Ok(_) => None,
            Err(Refused::Private(_)) => Some("private"),
            Err(Refused::Special(_)) => Some("special"),
            Err(Refused::Credentials) => Some("credentials"),
            Err(Refused::Scheme(_)) => Some("scheme"),
            Err(Refused::NoUrl(_) | Refused::NoHost | Refused::TooLong) => Some("no url"),
        }
    }

    #[test]
    fn every_spelling_of_a_private_address_is_private() {
        let spellings = [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://017700000001/",
            "http://127.0.0.1./",
            "http://127.0.0.1:8080/x",
            "http://127.255.255.254/",
            "http://[::1]/",
            "http://[0:0:0:0:0:0:0:1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:7f00:1]/",
            "http://[::127.0.0.1]/",
            "http://[64:ff9b::7f00:1]/",
            "http://[64:ff9b::10.0.0.1]/",
            "http://[2002:7f00:1::]/",
            "http://localhost/",
            "http://LOCALHOST/",
            "http://localhost./",
            "http://a.localhost/",
            "http://10.0.0.1/",
            "http://172.16.0.1/",
            "http://172.31.255.255/",
            "http://192.168.1.1/",
            "http://3232235777/",
            "http://[fc00::1]/",
            "http://[fd12:3456::1]/",
            "http://\u{2460}\u{2461}\u{2466}.0.0.1/",
            "http://127\u{3002}0\u{3002}0\u{3002}1/",
            "http:\\\\127.0.0.1\\",
            "http:127.0.0.1",
            "http://%31%32%37.0.0.1/",
            "http://[::ffff:0:127.0.0.1]/",
        ];
        for url in spellings {
            let expected = Some("private");
            assert_eq!(refusal(url, Reach::Public), expected, "{url}");
            assert_eq!(refusal(url, Reach::PublicAndPrivate), None, "{url}");
        }
    }

    #[test]
    fn special_addresses_are_never_reached() {
        let special = [
            "http://169.254.169.254/latest/meta-data/",
            "http://2852039166/",
            "http://0xa9fea9fe/",
            "http://0251.0376.0251.0376/",
            "http://[::ffff:169.254.169.254]/",
            "http://[64:ff9b::a9fe:a9fe]/",
            "http://[2002:a9fe:a9fe::1]/",
            "http://[fd00:ec2::254]/",
            "http://[fe80::1]/",
            "http://[fec0::1]/",
            "http://0.0.0.0/",
            "http://0/",
            "http://[::]/",
            "http://[::ffff:0.0.0.0]/",
            "http://100.64.0.1/",
            "http://100.127.255.255/",
            "http://100.100.100.200/",
            "http://192.0.0.192/",
            "http://168.63.129.16/",
            "http://224.0.0.1/",
            "http://239.255.255.250/",
            "http://255.255.255.255/",
            "http://240.0.0.1/",
            "http://[ff02::1]/",
            "http://[2001:db8::1]/",
            "http://[2001::1]/",
            "http://[64:ff9b:1::1]/",
            "http://[100::1]/",
            "http://198.18.0.1/",
            "http://203.0.113.1/",
            "http://169.254.169.254./",
        ];
        for url in special {
            for reach in [Reach::Public, Reach::PublicAndPrivate] {
                assert_eq!(refusal(url, reach), Some("special"), "{url}");
            }
        }
    }

    #[test]
    fn what_is_no_plain_web_address_is_refused() {
        let long = format!("http://example.com/{}", "a".repeat(URL_MAX_BYTES));
        let bad = [
            ("file:///etc/passwd", "scheme"),
            ("gopher://example.com/", "scheme"),
            ("ftp://example.com/", "scheme"),
            ("javascript:alert(1)", "scheme"),
            ("unix:/run/docker.sock", "scheme"),
            ("", "no url"),
            ("/x", "no url"),
            ("http://", "no url"),
            ("http://[::1/", "no url"),
            ("http://256.1.1.1/", "no url"),
            ("http://a b/", "no url"),
            ("http://example.com@127.0.0.1/", "credentials"),
            ("http://user:pass@example.com/", "credentials"),
            (long.as_str(), "no url"),
        ];
        for (url, expected) in bad {
            assert_eq!(
                refusal(url, Reach::PublicAndPrivate),
                Some(expected),
                "{url}"
            );
        }
    }

    #[test]
    fn public_addresses_are_reached() {
        let good = [
            "https://example.com/hook?a=b",
            "http://8.8.8.8/",
            "http://172.15.0.1/",
            "http://172.32.0.1/",
            "http://100.63.0.1/",
            "http://100.128.0.1/",
            "http://[2606:4700::1111]/",
            "http://[2002:808:808::]/",
            "http://[64:ff9b::808:808]/",
            "http://192.0.1.1/",
            "http://localhost.example.com/",
        ];
        for url in good {
            assert_eq!(refusal(url, Reach::Public), None, "{url}");
        }
    }

    #[test]
    fn a_name_leads_only_to_its_addresses_within_reach() {
        let found = ["10.0.0.1:0", "8.8.8.8:0", "169.254.169.254:0"]
            .map(|address| address.parse().unwrap());
        let left: Vec<_> = within_reach(found.into_iter(), Reach::Public)
            .ok()
            .unwrap()
            .collect();
        assert_eq!(left, [found[1]]);
        let error = within_reach(found[2..].iter().copied(), Reach::PublicAndPrivate)
            .err()
            .unwrap();
        assert!(
            error
                .to_string()
                .starts_with("169.254.169.254 is never called"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_name_is_checked_where_it_is_resolved() {
        let resolver = GuardedResolver {
            reach: Reach::Public,
        };
        let error = resolver
            .resolve("localhost".parse().unwrap())
            .await
            .err()
            .unwrap();
        assert!(
            error.to_string().contains("callback_allow_private"),
            "{error}"
        );
    }
}
