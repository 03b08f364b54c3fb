//! The HTTP clients for every call that leaves the gateway. What may be reached, for which purpose, is checked on the
//! very addresses that are connected to, after name resolution; redirects are not followed, proxies not asked.
//! Sources: OWASP's SSRF prevention cheat sheet; IANA's special-purpose address registries.

mod network;

use std::error::Error;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use url::{Host, Url};

pub use network::{Network, NoNetwork};

/// The longest URL taken.
const URL_MAX_BYTES: usize = 2_048;
/// Longest time for one callback, from resolving to the answer's head (`contracts/gpu-gateway.md` section 4).
const CALLBACK_TIMEOUT: Duration = Duration::from_secs(10);
/// Callbacks are rare and go many ways: few connections are worth keeping.
const CALLBACKS_IDLE_PER_HOST: usize = 1;
/// Longest time to connect to a service, which is on this machine or near it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an idle connection to a service is kept: less than the 5 s after which common servers (uvicorn, Node) close
/// theirs, so that a job is not posted into a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// What a call is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To addresses that submitters of runs choose.
    Callbacks,
    /// To services, whose addresses operators choose: health, jobs, progress.
    Services,
    /// To the issuer of signed tokens, for its keys.
    Issuer,
    /// To the channels that tenants' administrators choose.
    Notifications,
}

impl Purpose {
    /// What lets special addresses be called, as the end of a sentence about one.
    fn special_remedy(self) -> &'static str {
        match self {
            Purpose::Callbacks => ", and not in the setting callback_allow_networks",
            Purpose::Services => ", and not in the setting service_allow_networks",
            Purpose::Issuer => "; an issuer cannot be there",
            Purpose::Notifications => ", and not in the setting notify_allow_networks",
        }
    }

    /// What lets private addresses be called.
    fn private_remedy(self) -> &'static str {
        match self {
            Purpose::Callbacks => {
                "if the setting callback_allow_private is true, or callback_allow_networks holds them"
            }
            Purpose::Services => "if the setting service_allow_networks holds them",
            Purpose::Issuer => "if the setting sso_allow_private is true",
            Purpose::Notifications => {
                "if the setting notify_allow_private is true, or notify_allow_networks holds them"
            }
        }
    }
}

/// How far a client may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Addresses of the public internet.
    Public,
    /// Those, and this machine and its private networks.
    PublicAndPrivate,
}

/// The addresses of a name, as they are asked for.
pub type Found = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Finds the addresses of names.
pub type Lookup = Arc<dyn Fn(String) -> Found + Send + Sync>;

/// What may be called for one purpose.
#[derive(Clone)]
pub struct Rules {
    purpose: Purpose,
    reach: Reach,
    /// Called whatever kind they are.
    allowed: Vec<Network>,
    lookup: Lookup,
}

impl Rules {
    /// With names looked up by the system.
    pub fn new(purpose: Purpose, reach: Reach, allowed: Vec<Network>) -> Rules {
        let lookup: Lookup = Arc::new(|name| {
            Box::pin(async move {
                let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
                Ok(found.collect())
            })
        });
        Rules {
            purpose,
            reach,
            allowed,
            lookup,
        }
    }

    /// With names looked up in another way.
    pub fn with_lookup(self, lookup: Lookup) -> Rules {
        Rules { lookup, ..self }
    }

    /// What can be told of a URL without resolving its name: everything but where the name leads.
    ///
    /// # Errors
    /// Why it is not called.
    pub fn check_url(&self, text: &str) -> Result<Url, Refused> {
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
            Host::Ipv4(address) => self.check_address(IpAddr::V4(address))?,
            Host::Ipv6(address) => self.check_address(IpAddr::V6(address))?,
            Host::Domain(name) => {
                let name = name.trim_end_matches('.');
                // It leads nowhere else (RFC 6761 section 6.3); of other names that is checked when it is known.
                if name == "localhost" || name.ends_with(".localhost") {
                    self.check_address(Ipv4Addr::LOCALHOST.into())?;
                }
            }
        }
        Ok(url)
    }

    /// Whether an address may be connected to. One that wraps an IPv4 address is judged as that.
    ///
    /// # Errors
    /// Why it is not called.
    pub fn check_address(&self, address: IpAddr) -> Result<(), Refused> {
        let bare = match address {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => wrapped_v4(address).map_or(address.into(), IpAddr::V4),
        };
        if self.allowed.iter().any(|network| network.contains(bare)) {
            return Ok(());
        }
        let kind = match bare {
            IpAddr::V4(address) => kind_v4(address),
            IpAddr::V6(address) => kind_v6(address),
        };
        match (kind, self.reach) {
            (Kind::Public, _) | (Kind::Private, Reach::PublicAndPrivate) => Ok(()),
            (Kind::Private, Reach::Public) => Err(Refused::Private {
                address,
                remedy: self.purpose.private_remedy(),
            }),
            (Kind::Special, _) => Err(Refused::Special {
                address,
                remedy: self.purpose.special_remedy(),
            }),
        }
    }

    /// Those of a name's addresses that may be called.
    fn within(&self, found: Vec<SocketAddr>) -> Result<Addrs, Refused> {
        let mut allowed = Vec::new();
        let mut refused = None;
        for address in found {
            match self.check_address(address.ip()) {
                Ok(()) => allowed.push(address),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if allowed.is_empty() => Err(error),
            _ => Ok(Box::new(allowed.into_iter())),
        }
    }
}

impl std::fmt::Debug for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rules")
            .field("purpose", &self.purpose)
            .field("reach", &self.reach)
            .field("allowed", &self.allowed)
            .finish_non_exhaustive()
    }
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
    #[error("{address} is a link-local, metadata, multicast or otherwise special address{remedy}")]
    Special {
        address: IpAddr,
        remedy: &'static str,
    },
    #[error("{address} is private; private addresses are called only {remedy}")]
    Private {
        address: IpAddr,
        remedy: &'static str,
    },
}

/// Why a call failed, when that is because its name led to an address that is refused.
pub fn refusal(error: &reqwest::Error) -> Option<&Refused> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(refused);
        }
        cause = error.source();
    }
    None
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Public,
    /// This machine and private networks.
    Private,
    /// Nothing that a gateway has any business with.
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

/// The IPv4 address that an IPv6 address leads to.
fn wrapped_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let (high, low) = match address.segments() {
        // Not wrapped: loopback, and the unspecified address.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => return None,
        // Mapped, translated and compatible addresses.
        [0, 0, 0, 0, 0, 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0, 0, 0, 0, 0, 0, high, low] => (high, low),
        // NAT64 and 6to4.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => (high, low),
        _ => return None,
    };
    let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
    Some(Ipv4Addr::new(a, b, c, d))
}

fn kind_v6(address: Ipv6Addr) -> Kind {
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => Kind::Private,
        // Metadata of Amazon, Google, Oracle and Scaleway, in the middle of the private range.
        [0xfd00, 0x0ec2, ..]
        | [0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x0254]
        | [0xfd00, 0x00c1, 0, 0, 0, 0, 0xa9fe, 0xa9fe]
        | [0xfd00, 0x0042, 0, 0, 0, 0, 0, 0x0042] => Kind::Special,
        [first, ..] if first & 0xfe00 == 0xfc00 => Kind::Private,
        // Documentation; Teredo and other protocol assignments.
        [0x2001, 0x0db8, ..] => Kind::Special,
        [0x2001, second, ..] if second < 0x200 => Kind::Special,
        // All that is global is in 2000::/3; what is left is unspecified, link-local, site-local, multicast, discard or
        // unassigned.
        [first, ..] if first & 0xe000 == 0x2000 => Kind::Public,
        _ => Kind::Special,
    }
}

/// An HTTP client that keeps to its rules.
#[derive(Clone, Debug)]
pub struct GuardedClient {
    client: reqwest::Client,
    rules: Arc<Rules>,
}

impl GuardedClient {
    /// For callbacks.
    ///
    /// # Errors
    /// The system's TLS roots cannot be used; so for all of these.
    pub fn for_callbacks(rules: Rules) -> Result<GuardedClient, reqwest::Error> {
        let builder = reqwest::Client::builder()
            .timeout(CALLBACK_TIMEOUT)
            .pool_max_idle_per_host(CALLBACKS_IDLE_PER_HOST);
        GuardedClient::build(rules, builder)
    }

    /// For notifications: they are as rare.
    ///
    /// # Errors
    /// As `for_callbacks`.
    pub fn for_notifications(rules: Rules) -> Result<GuardedClient, reqwest::Error> {
        GuardedClient::for_callbacks(rules)
    }

    /// For an issuer's keys: they are fetched now and then.
    ///
    /// # Errors
    /// As `for_callbacks`.
    pub fn for_issuer(rules: Rules) -> Result<GuardedClient, reqwest::Error> {
        GuardedClient::for_callbacks(rules)
    }

    /// For jobs: keeps connections, since latency matters. How long an answer may take is the caller's to say.
    ///
    /// # Errors
    /// As `for_callbacks`.
    pub fn for_jobs(rules: Rules) -> Result<GuardedClient, reqwest::Error> {
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .pool_idle_timeout(IDLE_TIMEOUT);
        GuardedClient::build(rules, builder)
    }

    /// For probes: keeps no connection, which would occupy a server that serves one at a time.
    ///
    /// # Errors
    /// As `for_callbacks`.
    pub fn for_probes(rules: Rules) -> Result<GuardedClient, reqwest::Error> {
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(0);
        GuardedClient::build(rules, builder)
    }

    fn build(
        rules: Rules,
        builder: reqwest::ClientBuilder,
    ) -> Result<GuardedClient, reqwest::Error> {
        let rules = Arc::new(rules);
        let client = builder
            // A proxy would connect in our place, unchecked.
            .no_proxy()
            .redirect(Policy::none())
            .user_agent(concat!("rungate/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(GuardedResolver {
                rules: Arc::clone(&rules),
            }))
            .build()?;
        Ok(GuardedClient { client, rules })
    }

    /// A GET of `url`. Addresses written as such are checked here, since the connector asks no resolver for them, and
    /// names when connecting.
    ///
    /// # Errors
    /// Why it is not called.
    pub fn get(&self, url: &str) -> Result<reqwest::RequestBuilder, Refused> {
        Ok(self.client.get(self.rules.check_url(url)?))
    }

    /// A POST to `url`, checked like a GET.
    ///
    /// # Errors
    /// Why it is not called.
    pub fn post(&self, url: &str) -> Result<reqwest::RequestBuilder, Refused> {
        Ok(self.client.post(self.rules.check_url(url)?))
    }
}

/// Resolves names to those of their addresses that may be called. The connector uses these very addresses, so
/// that a name which changes between check and use gains nothing.
struct GuardedResolver {
    rules: Arc<Rules>,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let rules = Arc::clone(&self.rules);
        Box::pin(async move {
            let found = (rules.lookup)(name.as_str().to_owned()).await?;
            Ok(rules.within(found)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::refusal as refusal_of;
    use super::*;

    fn rules(reach: Reach) -> Rules {
        Rules::new(Purpose::Callbacks, reach, Vec::new())
    }

    fn refusal(url: &str, reach: Reach) -> Option<&'static str> {
        match rules(reach).check_url(url) {
            Ok(_) => None,
            Err(Refused::Private { .. }) => Some("private"),
            Err(Refused::Special { .. }) => Some("special"),
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
        let within = |reach, found: &[SocketAddr]| rules(reach).within(found.to_vec());
        let left: Vec<_> = within(Reach::Public, &found).ok().unwrap().collect();
        assert_eq!(left, [found[1]]);
        let error = within(Reach::PublicAndPrivate, &found[2..]).err().unwrap();
        assert!(matches!(error, Refused::Special { .. }), "{error}");
    }

    #[test]
    fn a_network_may_be_allowed_whatever_it_is() {
        let allowed = vec!["100.64.0.0/10".parse().unwrap()];
        let rules = Rules::new(Purpose::Services, Reach::Public, allowed);
        let good = ["100.64.0.1", "::ffff:100.64.0.1", "64:ff9b::100.64.0.1"];
        for address in good {
            rules.check_address(address.parse().unwrap()).unwrap();
        }
        for address in ["100.128.0.1", "169.254.169.254", "127.0.0.1"] {
            let checked = rules.check_address(address.parse().unwrap());
            assert_eq!(checked.is_ok(), address == "100.128.0.1", "{address}");
        }
    }

    #[tokio::test]
    async fn a_name_is_checked_where_it_is_resolved() {
        let lookup: Lookup = Arc::new(|name| {
            assert_eq!(name, "leads-here.example");
            Box::pin(async { Ok(vec![SocketAddr::from(([127, 0, 0, 1], 0))]) })
        });
        let rules = rules(Reach::Public).with_lookup(lookup);
        let client = GuardedClient::for_callbacks(rules).unwrap();
        let request = client.post("http://leads-here.example:9/").unwrap();
        let error = request.send().await.unwrap_err();
        let refused = refusal_of(&error).expect("it is refused");
        assert!(refused.to_string().contains("callback_allow_private"));
    }
}
