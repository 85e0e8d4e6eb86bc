//! Integer instructions against a second description of them, which works on single bits.

use proptest::prelude::*;

use crate::machine::vcpu::assist::integer::{self, CF, Flagged, OF, SF, Width, ZF};

/// A number as its bits, from the lowest on.
type Bits = Vec<bool>;

fn split(value: u64, width: usize) -> Bits {
    (0..width).map(|bit| value >> bit & 1 != 0).collect()
}

fn join(bits: &[bool]) -> u64 {
    bits.iter().rev().fold(0, |value, bit| value << 1 | u64::from(*bit))
}

fn is_zero(bits: &[bool]) -> bool {
    !bits.contains(&true)
}

/// Flag bits by name: those that are true.
fn flags(of: [(u64, bool); 4]) -> u64 {
    of.into_iter().filter(|(_, on)| *on).map(|(flag, _)| flag).sum()
}

/// The model's result with SF and ZF as usual, and this CF.
fn logic(bits: &[bool], carry: bool) -> Flagged {
    let set = flags([(ZF, is_zero(bits)), (SF, bits[bits.len() - 1]), (CF, carry), (OF, false)]);
    Flagged { value: join(bits), written: ZF | SF | CF | OF, set }
}

/// `a` + `b` + `carry` by single bits, and the carry out of the last.
fn add(a: &[bool], b: &[bool], mut carry: bool) -> (Bits, bool) {
    let sum = a.iter().zip(b).map(|(a, b)| {
        let ones = [*a, *b, carry].into_iter().filter(|bit| *bit).count();
        carry = ones >= 2;
        ones % 2 == 1
    });
    let sum = sum.collect();
    (sum, carry)
}

/// The product's bits, as sums of shifted factors.
fn multiply(a: &[bool], b: &[bool]) -> Bits {
    let width = a.len() + b.len();
    let mut product = vec![false; width];
    for shift in (0..b.len()).filter(|bit| b[*bit]) {
        let shifted: Bits = (0..width).map(|bit| bit >= shift && bit - shift < a.len() && a[bit - shift]).collect();
        product = add(&product, &shifted, false).0;
    }
    product
}

fn numbers() -> impl Strategy<Value = u64> {
    let few = any::<[u64; 3]>().prop_map(|[a, b, c]| a & b & c);
    let one = (0..64u32).prop_map(|bit| 1 << bit);
    prop_oneof![any::<u64>(), few, one, prop::sample::select(vec![0, 1, u64::MAX, 0xffff_ffff, 1 << 63, 1 << 31])]
}

/// Numbers of which the low bits, which instructions take for a count, are near the operands' sizes.
fn counts() -> impl Strategy<Value = u64> {
    (any::<u64>(), prop_oneof![0..70u64, any::<u64>()], prop_oneof![0..70u64, any::<u64>()])
        .prop_map(|(rest, first, second)| rest << 16 | (second & 0xff) << 8 | first & 0xff)
}

const WIDTHS: [(Width, usize); 2] = [(Width::W32, 32), (Width::W64, 64)];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    // Catches: a wrong bit of a result, a flag that is wrong or that is written although it is left alone, a result
    // that does not end with the operand.
    #[test]
    fn bits_of_one_number(source in numbers()) {
        for (width, bits) in WIDTHS {
            let given = source & width.mask();
            let all = split(given, bits);
            let lowest = all.iter().position(|bit| *bit);
            let isolated: Bits = (0..bits).map(|bit| Some(bit) == lowest).collect();
            prop_assert_eq!(integer::blsi(given, width), logic(&isolated, lowest.is_some()));
            let up_to: Bits = (0..bits).map(|bit| lowest.is_none_or(|lowest| bit <= lowest)).collect();
            prop_assert_eq!(integer::blsmsk(given, width), logic(&up_to, lowest.is_none()));
            let without: Bits = (0..bits).map(|bit| all[bit] && Some(bit) != lowest).collect();
            prop_assert_eq!(integer::blsr(given, width), logic(&without, lowest.is_none()));
            let ones = all.iter().filter(|bit| **bit).count() as u64;
            let expected = Flagged { value: ones, written: 0x8d5, set: if ones == 0 { ZF } else { 0 } };
            prop_assert_eq!(integer::popcnt(given), expected);
        }
    }

    // Catches: operands exchanged, counts that are not taken modulo the size, an index or length beyond the operand.
    #[test]
    fn bits_of_two_numbers(source in numbers(), other in numbers(), count in counts()) {
        for (width, bits) in WIDTHS {
            let (a, b) = (split(source, bits), split(other, bits));
            let (source, other, count) = (source & width.mask(), other & width.mask(), count & width.mask());
            let and_not: Bits = a.iter().zip(&b).map(|(a, b)| !a && *b).collect();
            prop_assert_eq!(integer::andn(source, other, width), logic(&and_not, false));
            let (start, length) = ((count & 0xff) as usize, (count >> 8 & 0xff) as usize);
            let field: Bits = (0..bits).map(|bit| bit < length && bit + start < bits && a[bit + start]).collect();
            let Flagged { value, written, set } = logic(&field, false);
            let unsigned = Flagged { value, written: written & !SF, set: set & !SF };
            prop_assert_eq!(integer::bextr(source, count, width), unsigned);
            let below: Bits = (0..bits).map(|bit| bit < start && a[bit]).collect();
            prop_assert_eq!(integer::bzhi(source, count, width), logic(&below, start >= bits));
            let by = start % bits;
            let rotated: Bits = (0..bits).map(|bit| a[(bit + by) % bits]).collect();
            prop_assert_eq!(integer::rorx(source, count, width), join(&rotated));
            let left: Bits = (0..bits).map(|bit| bit >= by && a[bit - by]).collect();
            prop_assert_eq!(integer::shlx(source, count, width), join(&left));
            let right: Bits = (0..bits).map(|bit| bit + by < bits && a[bit + by]).collect();
            prop_assert_eq!(integer::shrx(source, count, width), join(&right));
            let signed: Bits = (0..bits).map(|bit| a[(bit + by).min(bits - 1)]).collect();
            prop_assert_eq!(integer::sarx(source, count, width), join(&signed));
        }
    }

    // Catches: a carry that is lost or kept in the wrong flag, halves of a product exchanged.
    #[test]
    fn sums_and_products(a in numbers(), b in numbers(), carry: bool) {
        for (width, bits) in WIDTHS {
            let (a, b) = (a & width.mask(), b & width.mask());
            let (sum, carried) = add(&split(a, bits), &split(b, bits), carry);
            for flag in [CF, OF] {
                let expected = Flagged { value: join(&sum), written: flag, set: if carried { flag } else { 0 } };
                prop_assert_eq!(integer::add(a, b, carry, width, flag), expected);
            }
            let product = multiply(&split(a, bits), &split(b, bits));
            prop_assert_eq!(integer::mulx(a, b, width), (join(&product[bits..]), join(&product[..bits])));
        }
    }

    // Catches: bits at the wrong places, more or fewer than the mask has.
    #[test]
    fn bits_to_and_from_places(source in numbers(), mask in numbers()) {
        let (all, places) = (split(source, 64), split(mask, 64));
        let mut taken = 0;
        let deposited: Bits = places.iter().map(|place| {
            taken += usize::from(*place);
            *place && all[taken - 1]
        }).collect();
        prop_assert_eq!(integer::pdep(source, mask), join(&deposited));
        let extracted: Bits = all.iter().zip(&places).filter(|(_, place)| **place).map(|(bit, _)| *bit).collect();
        prop_assert_eq!(integer::pext(source, mask), join(&extracted));
    }
}
