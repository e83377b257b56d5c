import pytest

from sparsight.integrations import callback_from
from sparsight.settings.methods import CompressorConfig, SkipperConfig

WANTED = {
    "compressor": CompressorConfig(keep=0.5, method="pool").model_dump(mode="json"),
    "skipper": SkipperConfig(alpha=0.2).model_dump(mode="json"),
    "seed": 4,
}


def test_a_mapping_text_and_text_of_each_key_are_the_same():
    compressor, skipper = {"keep": 0.5, "method": "pool"}, {"alpha": 0.2}
    for given in (
        {"compressor": compressor, "skipper": skipper, "seed": 4, "dense_probe": 5},
        {"compressor": "{keep: 0.5, method: pool}", "skipper": "alpha: 0.2", "seed": "4", "dense_probe": 5},
        "compressor: {keep: 0.5, method: pool}\nskipper: {alpha: 0.2}\nseed: 4\ndense_probe: 5",
    ):
        callback = callback_from(given)
        assert callback.settings() == WANTED and callback.dense_probe == 5 and callback.handle is None


@pytest.mark.parametrize(
    "given, said",
    [
        ({"compresor": {}}, "run.yaml: .*unknown key 'compresor' in CallbackConfig; did you mean 'compressor'"),
        (
            {"compressor": {"kep": 1}},
            "run.yaml: compressor: unknown key 'kep' in CompressorConfig; did you mean 'keep'",
        ),
        ({"skipper": {"alpha": "much"}}, "run.yaml: skipper.alpha: expected a number .given: 'much'"),
        ({"compressor": "{keep: "}, "run.yaml.compressor: .* is not YAML"),
        ("keep", "run.yaml: expected settings as compressor: .* found 'keep'"),
        ({}, "was given nothing to attach"),
    ],
)
def test_errors_name_the_keys(given, said):
    with pytest.raises(ValueError, match=said):
        callback_from(given, "run.yaml")
