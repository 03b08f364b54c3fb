//! Where a request came from: the client's address past the proxies that are trusted, and whether it came by
//! https. Nothing that a client can write itself counts.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use axum::extract::FromRequestParts;
use http::request::Parts;
use http::{Extensions, HeaderMap};

const FORWARDED_FOR: &str = "x-forwarded-for";
const FORWARDED_PROTO: &str = "x-forwarded-proto";

/// What the listener knows of a connection; in the extensions of each of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The other end of the socket: the client, or the last proxy.
    pub peer: IpAddr,
    pub is_tls: bool,
}

/// Where a request came from. The guard puts it into the request's extensions, before anything can be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// An IPv4 address that was wrapped in IPv6 stands as itself; `0.0.0.0` where no connection is known.
    pub address: IpAddr,
    /// By TLS of ours, or of a trusted proxy's.
    pub is_https: bool,
}

impl Client {
    /// Not known: a request that no listener has seen.
    const UNKNOWN: Client = Client {
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        is_https: false,
    };

    /// Reads it off a request. Each proxy appends whom it was called by, so that of `X-Forwarded-For` the entry
    /// `trusted_proxies` from the right is the last that a trusted one has written; with 0 the header means nothing.
    /// With fewer entries the request came past some proxy, and whose word the entries are is unknown: the other end
    /// of the connection counts, which nobody can choose.
    ///
    /// Of `X-Forwarded-Proto`, which proxies replace as often as they append, the last such entry counts: who claims
    /// https gets cookies that its own browser keeps to https, and nothing else.
    pub fn of(extensions: &Extensions, headers: &HeaderMap, trusted_proxies: usize) -> Client {
        let Some(connection) = extensions.get::<Connection>() else {
            return Client::UNKNOWN;
        };
        let hop = trusted_proxies.checked_sub(1);
        let forwarded_for = hop.and_then(|hop| entries(headers, FORWARDED_FOR).nth(hop));
        let address = forwarded_for.and_then(address_of);
        let protos = entries(headers, FORWARDED_PROTO).take(trusted_proxies);
        let proto = protos.last();
        Client {
            address: address.unwrap_or(connection.peer).to_canonical(),
            is_https: proto.map_or(connection.is_tls, |proto| {
                proto.eq_ignore_ascii_case(b"https")
            }),
        }
    }

    /// What its requests are counted by.
    pub fn network(&self) -> IpAddr {
        network(self.address)
    }
}

/// What is counted together when something of an address is counted: of IPv6 the /64, which one customer has whole.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// The address of a request's client.
pub fn address(extensions: &Extensions) -> IpAddr {
    found(extensions).address
}

/// Whether a request came by https.
pub fn is_https(extensions: &Extensions) -> bool {
    found(extensions).is_https
}

/// Where a request came from, as the guard has noted it.
pub fn found(extensions: &Extensions) -> Client {
    extensions.get().copied().unwrap_or(Client::UNKNOWN)
}

/// For routes that ask for no credentials; a `Caller` has its address itself.
impl<S: Sync> FromRequestParts<S> for Client {
    type Rejection = Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(found(&parts.extensions))
    }
}

/// The entries of a header's list from the right. They are taken apart as bytes: what a client has written into one is
/// no reason not to read the others.
fn entries<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(name).iter().rev();
    lines
        .flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
}

/// An address, with or without a port.
fn address_of(entry: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(entry).ok()?;
    let bracketed = text.strip_prefix('[').and_then(|text| text.split_once(']'));
    if let Some((inside, _)) = bracketed {
        return inside.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    text.parse().ok().or_else(|| {
        let (host, _port) = text.split_once(':')?;
        host.parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn client(is_tls: bool, trusted_proxies: usize, lines: &[(&'static str, &str)]) -> Client {
        let mut extensions = Extensions::new();
        let peer = "10.0.0.9".parse().unwrap();
        extensions.insert(Connection { peer, is_tls });
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        Client::of(&extensions, &headers, trusted_proxies)
    }

    #[test]
    fn the_address_is_the_hop_that_a_trusted_proxy_wrote() {
        let chain = &[
            (FORWARDED_FOR, "6.6.6.6, 1.1.1.1"),
            (FORWARDED_FOR, "2.2.2.2"),
        ];
        for (trusted, expected) in [
            (0, "10.0.0.9"),
            (1, "2.2.2.2"),
            (2, "1.1.1.1"),
            (3, "6.6.6.6"),
            // It came past some of them.
            (4, "10.0.0.9"),
            (9, "10.0.0.9"),
        ] {
            let address = client(false, trusted, chain).address;
            assert_eq!(address.to_string(), expected, "{trusted} trusted");
        }
    }

    #[test]
    fn an_entry_is_an_address_or_the_peer_counts() {
        for (entry, expected) in [
            ("1.2.3.4", "1.2.3.4"),
            ("1.2.3.4:567", "1.2.3.4"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]:567", "2001:db8::1"),
            ("::ffff:1.2.3.4", "1.2.3.4"),
            ("unknown", "10.0.0.9"),
            ("1.1.1.1, ", "10.0.0.9"),
            ("localhost:1", "10.0.0.9"),
            ("\u{e9}", "10.0.0.9"),
            ("\u{e9}\u{ff}, 1.2.3.4", "1.2.3.4"),
            ("6.6.6.6, \u{e9}", "10.0.0.9"),
        ] {
            let address = client(false, 1, &[(FORWARDED_FOR, entry)]).address;
            assert_eq!(address.to_string(), expected, "{entry}");
        }
        assert_eq!(client(false, 1, &[]).address.to_string(), "10.0.0.9");
    }

    #[test]
    fn only_a_trusted_proxy_can_say_https() {
        let said = &[(FORWARDED_PROTO, "https")];
        assert!(!client(false, 0, said).is_https);
        assert!(client(false, 1, said).is_https);
        assert!(!client(false, 1, &[(FORWARDED_PROTO, "https, http")]).is_https);
        assert!(client(false, 2, said).is_https);
        assert!(!client(true, 1, &[(FORWARDED_PROTO, "http")]).is_https);
        assert!(client(true, 0, &[]).is_https && client(true, 1, &[]).is_https);
        assert_eq!(
            Client::of(&Extensions::new(), &HeaderMap::new(), 1),
            Client::UNKNOWN
        );
    }

    #[test]
    fn a_network_is_an_ipv4_address_or_a_64_of_ipv6() {
        let network = |text: &str| {
            let address = text.parse().unwrap();
            let is_https = false;
            Client { address, is_https }.network().to_string()
        };
        assert_eq!(network("1.2.3.4"), "1.2.3.4");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
