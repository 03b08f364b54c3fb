//! Random numbers from a seed that a failing test prints, so that its choices can be made again.

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The seed of `variable`, or a new one.
    pub fn seed(variable: &str) -> u64 {
        let given = std::env::var(variable).ok();
        let new = || u64::from(uuid::Uuid::new_v4().as_fields().0);
        given.map_or_else(new, |text| text.parse().expect("a seed is a number"))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn pick<'a, T>(&mut self, among: &'a [T]) -> &'a T {
        let len = u64::try_from(among.len()).unwrap();
        &among[usize::try_from(self.below(len)).unwrap()]
    }
}
