//! Names for services whose creator gave none: an adjective and a noun, as Docker has it.

use rand::seq::IndexedRandom as _;

const ADJECTIVES: [&str; 32] = [
    "amber", "brave", "bright", "busy", "calm", "clever", "crisp", "eager", "early", "fair",
    "fleet", "gentle", "golden", "happy", "hardy", "honest", "keen", "kind", "lively", "lucid",
    "mellow", "merry", "mighty", "nimble", "patient", "proud", "quick", "quiet", "silver",
    "steady", "swift", "warm",
];
const NOUNS: [&str; 32] = [
    "acacia", "aster", "basil", "borage", "briar", "clover", "comfrey", "dahlia", "fennel",
    "garden", "hazel", "heather", "ivy", "jasmine", "larch", "laurel", "lavender", "linden",
    "lupin", "mallow", "maple", "meadow", "melissa", "orchard", "poppy", "rosemary", "sage",
    "thistle", "thyme", "tulip", "violet", "willow",
];

/// A name such as `busy_linden`.
pub(super) fn random(rng: &mut impl rand::Rng) -> String {
    let adjective = ADJECTIVES.choose(rng).expect("the list is not empty");
    let noun = NOUNS.choose(rng).expect("the list is not empty");
    format!("{adjective}_{noun}")
}
