//! Weighted turns: in which order servers come, each as often as its weight says
//! and its turns spread evenly over the round.

/// The heaviest weight. With more, the rounds of a few servers would be long, and
/// what a light one gets too little to be even.
pub const MAX_WEIGHT: u16 = 256;

/// Bits that tell the times of two turns apart: of weights up to [`MAX_WEIGHT`]
/// they differ by more than one in 2¹⁸ of a round.
const FRACTION: u32 = 20;

/// One round of turns, as indices into `weights`.
///
/// The turn number k, from 1 on, of a server with weight w comes at the time
/// (k − ½) ÷ w, of turns at one time that of the lower index first. So the order
/// of any two servers' turns depends on no third one.
///
/// # Panics
///
/// If there are more than 65,536 weights.
pub(super) fn round(weights: &[u16]) -> Vec<u16> {
    let divisor = divisor(weights);
    let mut turns = Vec::new();
    for (index, weight) in weights.iter().enumerate() {
        let weight = u64::from(weight / divisor);
        let index = u64::try_from(index).expect("a usize has no more than 64 bits");
        turns.extend((0..weight).map(|k| (((2 * k + 1) << FRACTION) / (2 * weight)) << 16 | index));
    }
    turns.sort_unstable();
    let index = |turn: u64| u16::try_from(turn & 0xffff).expect("16 bits");
    turns.into_iter().map(index).collect()
}

/// The greatest number that divides all weights.
fn divisor(weights: &[u16]) -> u16 {
    let gcd = |a: u16, b: u16| {
        let (mut a, mut b) = (a, b);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    weights.iter().copied().fold(0, gcd).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn turns_are_spread_over_the_round() {
        assert_eq!(round(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(round(&[7, 7]), [0, 1]);
        assert_eq!(round(&[5, 1, 1]), [0, 0, 0, 1, 2, 0, 0]);
        assert_eq!(round(&[4, 2]), [0, 1, 0]);
        assert_eq!(round(&[]), [0; 0]);
        let heaviest = round(&[MAX_WEIGHT, MAX_WEIGHT - 1]);
        assert_eq!(heaviest.len(), 511);
    }

    proptest! {
        /// In whatever part of a round, each server has had its share to within
        /// one turn; and two keep their order whatever others are there.
        #[test]
        fn shares_are_kept_all_along(weights in prop::collection::vec(1..=MAX_WEIGHT, 1..20)) {
            let turns = round(&weights);
            let mut had = vec![0u32; weights.len()];
            for turn in &turns {
                had[usize::from(*turn)] += 1;
                let of = |index: usize| (f64::from(had[index]), f64::from(weights[index]));
                let (latest, its_weight) = of(usize::from(*turn));
                for (had, weight) in (0..weights.len()).map(of) {
                    let apart = (latest / its_weight - had / weight).abs();
                    prop_assert!(apart <= 0.5 / its_weight + 0.5 / weight + 1e-9, "{turns:?}");
                }
            }
            let divisor = divisor(&weights);
            for (had, weight) in had.iter().zip(&weights) {
                prop_assert_eq!(*had, u32::from(weight / divisor));
            }
            let two: Vec<_> = turns.iter().copied().filter(|turn| *turn < 2).collect();
            if let [a, b, ..] = weights[..] {
                let alone = round(&[a, b]);
                let repeated: Vec<_> = alone.iter().cycle().take(two.len()).copied().collect();
                prop_assert_eq!(two, repeated);
            }
        }
    }
}
