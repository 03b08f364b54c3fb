//! When a chain of certificates expires: the end of the validity of each (RFC 5280 section 4.1.2.5), read without the rest.

use std::path::Path;
use std::time::SystemTime;

use jiff::tz::TimeZone;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

// Tags of DER (X.690).
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;

/// When the first certificate of a chain in PEM form expires; `None` when that cannot be read.
pub fn expires_at(path: &Path) -> Option<SystemTime> {
    let chain = CertificateDer::pem_file_iter(path).ok()?;
    let ends = chain.map(|certificate| not_after(&certificate.ok()?));
    let ends: Option<Vec<SystemTime>> = ends.collect();
    ends?.into_iter().min()
}

fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (signed, _) = element(certificate, SEQUENCE)?;
    let rest = element(signed, VERSION).map_or(signed, |(_, rest)| rest);
    let (_serial, rest) = element(rest, INTEGER)?;
    let (_algorithm, rest) = element(rest, SEQUENCE)?;
    let (_issuer, rest) = element(rest, SEQUENCE)?;
    let (validity, _) = element(rest, SEQUENCE)?;
    let (_, not_after) = time(validity)?;
    time(not_after)?.0
}

/// The content of the element that `der` begins with, if it has this tag, and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = der.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match length {
        0..=0x7f => (usize::from(*length), rest),
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(length & 0x7f))?;
            let length = bytes
                .iter()
                .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            (length, rest)
        }
        _ => return None,
    };
    if *first != tag {
        return None;
    }
    rest.split_at_checked(length)
}

/// A time, `None` when it is none of the calendar, and what follows it. Years have two digits until 2049.
fn time(der: &[u8]) -> Option<(Option<SystemTime>, &[u8])> {
    let short = |(text, rest)| (text, rest, 2);
    let long = |(text, rest)| (text, rest, 4);
    let found = element(der, UTC_TIME).map(short);
    let (text, rest, digits) = found.or_else(|| element(der, GENERALIZED_TIME).map(long))?;
    Some((moment(text, digits), rest))
}

/// `YYMMDDHHMMSSZ`, the year of two or four digits.
fn moment(text: &[u8], year_digits: usize) -> Option<SystemTime> {
    let text = std::str::from_utf8(text.strip_suffix(b"Z")?).ok()?;
    let (year, rest) = text.split_at_checked(year_digits)?;
    let year: i16 = match year.parse().ok()? {
        short @ 0..50 if year_digits == 2 => 2_000 + short,
        short if year_digits == 2 => 1_900 + short,
        year => year,
    };
    let part = |index: usize| rest.get(index * 2..index * 2 + 2)?.parse::<i8>().ok();
    let day = jiff::civil::Date::new(year, part(0)?, part(1)?).ok()?;
    let time = jiff::civil::Time::new(part(2)?, part(3)?, part(4)?, 0).ok()?;
    let zoned = day.to_datetime(time).to_zoned(TimeZone::UTC).ok()?;
    Some(SystemTime::from(zoned.timestamp()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn certificate(year: i32, month: u8, day: u8) -> String {
        let mut params = CertificateParams::new(vec!["gate.example".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, month, day);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().pem()
    }

    #[test]
    fn a_chain_expires_with_its_first_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chain.pem");
        // 2050 is written with four digits.
        let chain = [certificate(2050, 1, 1), certificate(2031, 2, 3)];
        for (pem, seconds) in [
            (chain[0].clone(), 2_524_608_000),
            (chain[1].clone(), 1_927_843_200),
            (chain.concat(), 1_927_843_200),
        ] {
            std::fs::write(&path, pem).unwrap();
            let expected = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(expires_at(&path), Some(expected));
        }
        std::fs::write(&path, "no certificate").unwrap();
        assert_eq!(expires_at(&path), None);
        assert_eq!(expires_at(&dir.path().join("missing")), None);
    }

    #[test]
    fn what_is_cut_off_or_changed_is_read_without_a_panic() {
        let pem = certificate(2031, 2, 3);
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        for end in 0..der.len() {
            assert_eq!(not_after(&der[..end]), None);
            let mut changed = der.to_vec();
            changed[end] = 0xff;
            let _ = not_after(&changed);
        }
    }
}
