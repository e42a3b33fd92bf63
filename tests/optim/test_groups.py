"""What is decayed, by role."""

from megnorm.optim.config import OptimConfig


def test_naming_one_role_leaves_the_others_as_they_were() -> None:
    config = OptimConfig(weight_decay=0.1, decay={"embed": 0.0})
    assert {role: config.decay_of(role) for role in ("embed", "q", "norm", "bias", "scale")} == {
        "embed": 0.0, "q": 0.1, "norm": 0.0, "bias": 0.0, "scale": 0.0,
    }  # fmt: skip
    assert OptimConfig(weight_decay=0.1, decay={"norm": 1.0}).decay_of("norm") == 0.1
