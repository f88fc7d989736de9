import pytest
import torch

from agent.adapt.domains import SOURCE, DomainConfig, DomainMemory, Opening
from agent.adapt.style import StyleReference

S = 20
REFERENCE = StyleReference(torch.zeros(S), torch.eye(S), frames=128)
NIGHT, FOG, SNOW = 5.0, -5.0, 15.0


def memory(max_domains=16):
    return DomainMemory(DomainConfig(max_domains=max_domains), REFERENCE)


def see(memory, level, frames, camera="cam", seed=0):
    """Frames whose style is `level` in every measure, give or take; the domain of each."""
    generator = torch.Generator().manual_seed(seed)
    styles = level + 0.3 * torch.randn(frames, S, generator=generator)
    return [each.domain for each in memory.assign((camera,) * frames, styles)]


def test_normal_frames_stay_in_the_source_domain():
    assert set(see(memory(), 0.0, 50)) == {SOURCE}


@pytest.mark.parametrize("oddity", [NIGHT, 30.0, 300.0])
def test_a_single_odd_frame_does_not_switch(oddity):
    domains = memory()
    see(domains, 0.0, 20)
    see(domains, oddity, 1)
    assert set(see(domains, 0.0, 20)) == {SOURCE}
    assert domains.domains == [SOURCE]


def test_a_new_domain_opens_and_stays():
    domains = memory()
    see(domains, 0.0, 20)
    night = see(domains, NIGHT, 30)
    assert night[:5] == [SOURCE] * 5
    assert night[-15:] == [1] * 15
    assert domains.opened() == [Opening(1, None)]


def test_a_switch_is_told_when_the_camera_has_settled():
    levels = torch.cat([torch.zeros(20), torch.full((20,), NIGHT), torch.zeros(20)])
    where = memory().assign(("cam",) * 60, levels[:, None].expand(-1, S))
    there, back = [n for n, each in enumerate(where) if each.switched]
    assert {each.domain for each in where[there - 3 : there + 1]} == {1}
    assert 20 < there < 40
    assert back == 43


def test_a_frame_that_looks_like_the_source_is_left_to_it_at_once():
    domains = memory()
    see(domains, NIGHT, 30)
    assert see(domains, 0.0, 1) == [SOURCE]
    assert see(domains, NIGHT, 1) == [1]


def test_what_was_opened_is_told_once():
    domains = memory()
    see(domains, NIGHT, 20)
    assert (domains.opened(), domains.opened()) == ([Opening(1, None)], [])


def test_a_domain_is_recognised_on_return():
    domains = memory()
    for level in (0.0, NIGHT, FOG, 0.0):
        last = see(domains, level, 30)[-1]
    assert last == SOURCE
    assert see(domains, NIGHT, 30, seed=1)[-1] == 1
    assert see(domains, FOG, 30, seed=1)[-1] == 2
    assert [each.domain for each in domains.opened()] == [1, 2]


def test_cameras_in_different_weather_share_a_batch():
    domains = memory()
    styles = torch.tensor([NIGHT, FOG]).repeat(30)[:, None].expand(60, S)
    last = domains.assign(("east", "west") * 30, styles)[-2:]
    assert [each.domain for each in last] == [1, 2]


def test_a_second_camera_finds_the_domain_that_the_first_opened():
    domains = memory()
    see(domains, NIGHT, 30, camera="east")
    assert see(domains, NIGHT, 30, camera="west", seed=1)[-1] == 1
    assert domains.domains == [SOURCE, 1]


def test_ids_are_bounded_and_the_domain_unseen_for_longest_gives_its_up():
    domains = memory(max_domains=3)
    for level in (NIGHT, FOG, NIGHT):
        see(domains, level, 30)
    domains.opened()
    assert see(domains, SNOW, 30)[-1] == 2  # fog's
    assert domains.opened() == [Opening(2, None)]
    assert sorted(domains.domains) == [SOURCE, 1, 2]


def test_a_camera_in_an_evicted_domain_falls_back_to_the_source():
    domains = memory(max_domains=2)
    see(domains, NIGHT, 30, camera="east")
    see(domains, FOG, 30, camera="west")
    assert see(domains, NIGHT, 1, camera="east") == [SOURCE]


def test_where_only_the_source_fits_no_domain_opens():
    domains = memory(max_domains=1)
    assert set(see(domains, NIGHT, 40)) == {SOURCE}
    assert domains.opened() == []


def test_shift_is_the_root_mean_square_distance_of_the_recent_mean():
    where = memory().assign(("cam",) * 2, torch.tensor([[4.0], [8.0]]).expand(2, S))
    assert [each.shift for each in where] == pytest.approx([4.0, 6.0])


def test_without_a_reference_the_first_frames_make_one():
    domains = DomainMemory(DomainConfig())
    assert set(see(domains, 7.0, 64)) == {SOURCE}
    assert domains.reference.mean.tolist() == pytest.approx([7.0] * S, abs=0.2)
    assert set(see(domains, 7.0, 40, seed=1)) == {SOURCE}
    assert see(domains, 7.0 + NIGHT, 40)[-1] == 1


def test_a_frame_that_looks_like_no_domain_is_answered_as_if_nothing_were_known():
    domains = memory()
    see(domains, NIGHT, 30)
    assert see(domains, SNOW, 2) == [SOURCE, SOURCE]
    assert see(domains, NIGHT, 1, seed=2) == [1]


def test_a_stranger_does_not_move_a_domain_that_is_known_well():
    domains = memory()
    see(domains, NIGHT, 200)
    before = domains._gaussians._mean[1].copy()
    see(domains, NIGHT + 0.5, 40, seed=1)  # a domain of its own, of which the first hears later
    assert abs(domains._gaussians._mean[1] - before).max() < 0.1
    assert len(domains.domains) == 3


def test_weather_that_thickens_goes_on_to_a_domain_of_its_kin_and_comes_back():
    domains = memory()
    see(domains, NIGHT, 200)
    assert see(domains, NIGHT + 0.15, 100, seed=1)[-1] == 2
    assert see(domains, NIGHT + 0.8, 100, seed=2)[-1] == 3
    assert see(domains, NIGHT, 30, seed=3)[-1] == 1
    assert domains.opened() == [Opening(1, None), Opening(2, 1), Opening(3, None)]


def test_a_domain_stays_what_it_settled_on():
    domains = memory()
    see(domains, NIGHT, 250)
    before = domains._gaussians._mean[1].copy()
    assert set(see(domains, NIGHT + 0.02, 250, seed=1)) == {1}
    assert (domains._gaussians._mean[1] == before).all()


def test_a_domain_that_was_split_off_inherits_nothing():
    domains = memory()
    see(domains, NIGHT, 200)
    see(domains, NIGHT + 0.15, 100, seed=1)
    assert domains.opened()[-1] == Opening(2, 1)
    domains.split("cam", 2)
    assert domains.opened() == [Opening(3, None)]


def test_a_camera_at_rest_is_not_taken_for_a_domain():
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(S, generator=generator)  # as far from the mean as any normal frame
    still = scene + 0.05 * torch.randn(100, S, generator=generator)
    assert {each.domain for each in memory().assign(("cam",) * 100, still)} == {SOURCE}


def test_a_style_that_is_not_finite_is_left_out():
    domains = memory()
    see(domains, NIGHT, 30)
    where = domains.assign(("cam",) * 20, torch.full((20, S), float("nan")))
    assert {each.domain for each in where} == {SOURCE}
    assert set(see(domains, NIGHT, 10, seed=1)) == {1}
    assert domains.domains == [SOURCE, 1]


def test_an_odd_frame_at_the_opening_does_not_make_room_for_everything():
    domains = memory()
    see(domains, NIGHT, 5)
    see(domains, 300.0, 1)
    see(domains, NIGHT, 30, seed=1)
    assert see(domains, FOG, 30)[-1] not in (SOURCE, see(domains, NIGHT, 1)[0])


def test_an_id_is_taken_as_soon_as_it_is_given(monkeypatch):
    domains = memory()
    monkeypatch.setattr("agent.adapt.domains._Gaussians.resembles", lambda *_: False)
    see(domains, NIGHT, 30, camera="east")
    see(domains, FOG, 30, camera="west")
    assert [each.domain for each in domains.opened()] == [1, 2]


def test_eviction_does_not_count_as_seeing_a_camera():
    domains = memory(max_domains=2)
    for camera in ("east", "west"):
        see(domains, 0.0, 1, camera=camera)
    see(domains, NIGHT, 30, camera="north")
    see(domains, FOG, 30, camera="south")  # evicts the night
    assert list(domains._cameras._LRUCache__order) == ["east", "west", "north", "south"]


def test_a_camera_may_be_given_a_domain_of_its_own():
    domains = memory()
    see(domains, NIGHT, 30, camera="east")
    see(domains, NIGHT, 30, camera="west", seed=1)
    domains.opened()
    domains.split("west", 1)
    assert domains.opened() == [Opening(2, None)]
    assert set(see(domains, NIGHT, 30, camera="west", seed=2)) == {2}  # however alike
    assert see(domains, NIGHT, 1, camera="east", seed=2) == [1]
    domains.split("west", 1)  # which it has left
    assert domains.domains == [SOURCE, 1, 2]


def test_a_camera_stays_out_of_a_domain_that_did_not_fit_until_its_id_is_anothers():
    domains = memory(max_domains=3)
    see(domains, NIGHT, 40)
    domains.split("cam", 1)
    for _ in range(3):
        see(domains, 0.0, 30)
        assert see(domains, NIGHT, 30)[-1] == 2
    assert domains.domains == [SOURCE, 1, 2]
    see(domains, FOG, 30)  # takes the id
    assert domains._cameras["cam"].unfit == set()


def test_the_last_id_may_be_split_off_itself():
    domains = memory(max_domains=2)
    see(domains, NIGHT, 40)
    domains.split("cam", 1)
    assert set(see(domains, NIGHT, 30)) == {1}


@pytest.mark.parametrize("frames", [0, 3])
def test_a_camera_of_which_little_was_seen_is_not_split_off(frames):
    domains = memory()
    see(domains, NIGHT, 30, camera="east")
    if frames:
        see(domains, NIGHT, frames, camera="west")
    domains.split("west", 1)
    assert domains.domains == [SOURCE, 1]


@pytest.mark.parametrize(("normal", "domain"), [(0.2, SOURCE), (0.05, 1)])
def test_in_doubt_a_frame_is_normal(normal, domain, monkeypatch):
    domains = memory()
    see(domains, NIGHT, 30)

    def doubt(self, camera, gaussians, white_S):
        camera.belief[:] = 0
        camera.belief[[SOURCE, 1]] = normal, 1 - normal

    monkeypatch.setattr(DomainMemory, "_filter", doubt)
    assert see(domains, NIGHT, 1) == [domain]
