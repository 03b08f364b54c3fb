//! The words of a script's line: names, numbers, durations, amounts of memory.

use std::collections::BTreeMap;

/// The words of one line: the command, its plain arguments, its `key=value` ones.
pub struct Line<'a> {
    pub verb: &'a str,
    pub plain: Vec<&'a str>,
    pub keyed: BTreeMap<&'a str, &'a str>,
}

impl<'a> Line<'a> {
    pub fn parse(text: &'a str) -> Line<'a> {
        let mut words = text.split_whitespace();
        let verb = words.next().unwrap_or("");
        let (keyed, plain): (Vec<&str>, Vec<&str>) = words.partition(|word| word.contains('='));
        let keyed = keyed
            .iter()
            .filter_map(|word| word.split_once('='))
            .collect();
        Line { verb, plain, keyed }
    }

    pub fn name(&self) -> &'a str {
        self.plain
            .first()
            .unwrap_or_else(|| panic!("'{}' needs a name", self.verb))
    }

    pub fn has(&self, word: &str) -> bool {
        self.plain.contains(&word)
    }

    pub fn number(&self, key: &str) -> Option<u32> {
        self.keyed
            .get(key)
            .map(|text| text.parse().unwrap_or_else(|_| panic!("{key}={text}")))
    }

    pub fn ms(&self, key: &str) -> Option<u64> {
        self.keyed.get(key).map(|text| ms(text))
    }
}

/// `500ms`, `2s`, `10m`, `1h`, each with a fraction if need be.
pub fn ms(text: &str) -> u64 {
    let digits = text.trim_end_matches(|c: char| c.is_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 1.0,
        "s" => 1_000.0,
        "m" => 60_000.0,
        "h" => 3_600_000.0,
        _ => panic!("'{text}' is no duration"),
    };
    let number: f64 = digits
        .parse()
        .unwrap_or_else(|_| panic!("'{text}' is no duration"));
    (number * unit).round() as u64
}

/// `16GiB` or `300MiB`, as MiB.
pub fn mib(text: &str) -> u64 {
    let (digits, unit) = match (text.strip_suffix("GiB"), text.strip_suffix("MiB")) {
        (Some(digits), _) => (digits, 1024),
        (_, Some(digits)) => (digits, 1),
        _ if text == "0" => (text, 1),
        _ => panic!("'{text}' is no amount of memory"),
    };
    digits
        .parse::<u64>()
        .unwrap_or_else(|_| panic!("'{text}' is no amount of memory"))
        * unit
}
