"""Retry budgets: tokens are conserved over any number of processes, and few decisions ask the cluster."""

from __future__ import annotations

import random

import pytest

from pyworkflow_ray.resilience.budget import Ask, Bucket, BudgetSettings, Share

DEFAULTS = BudgetSettings()


class Cluster:
    """Processes with shares of one bucket; answers may get lost on the way there, and processes may die."""

    def __init__(self, processes: int, settings: BudgetSettings = DEFAULTS, seed: int = 0, lost: float = 0.0) -> None:
        self.bucket = Bucket(settings)
        self.shares = [Share(settings) for _ in range(processes)]
        self.rng = random.Random(seed)
        self.lost = lost
        self.decisions = self.calls = self.retries = self.successes = 0
        self.spent = 0.0

    def send(self, ask: Ask) -> float | None:
        self.calls += 1
        return None if self.rng.random() < self.lost else self.bucket.exchange(ask.returned, ask.wants)

    def retry(self, process: int, throttled: bool = False) -> bool:
        share = self.shares[process]
        self.decisions += 1
        answer = share.retry(throttled)
        if isinstance(answer, Ask):
            granted = self.send(answer)
            if granted is None:
                answer = share.unanswered(answer, throttled)
            else:
                share.granted(granted)
                answer = share.spend(throttled)
        if answer:
            self.retries += 1
            self.spent += share.settings.cost(throttled)
        return answer

    def success(self, process: int) -> None:
        share = self.shares[process]
        self.decisions += 1
        self.successes += 1
        ask = share.success()
        if ask is not None:
            granted = self.send(ask)
            if granted is None:
                share.unanswered(ask)
            else:
                share.granted(granted)


def test_case_11_the_defaults_are_those_of_todays_aws_sdk() -> None:
    assert DEFAULTS.model_dump() == {"tokens": 500, "retry_cost": 14, "throttle_cost": 5, "refund": 1}
    assert (DEFAULTS.cost(False), DEFAULTS.cost(True)) == (14, 5)


def test_one_process_gets_most_of_the_bucket_before_it_is_refused() -> None:
    cluster = Cluster(1)
    while cluster.retry(0):
        pass
    assert 30 <= cluster.retries <= 500 // 14


def test_a_small_bucket_is_given_whole() -> None:
    cluster = Cluster(1, BudgetSettings(tokens=28))
    assert [cluster.retry(0) for _ in range(4)] == [True, True, False, False]


def test_a_throttled_attempt_is_cheaper_to_repeat() -> None:
    cluster = Cluster(1, BudgetSettings(tokens=14))
    assert [cluster.retry(0, throttled=True) for _ in range(4)] == [True, True, False, False]


def test_successes_give_tokens_back_up_to_the_bucket() -> None:
    cluster = Cluster(1, BudgetSettings(tokens=28))
    while cluster.retry(0):
        pass
    for _ in range(14):
        cluster.success(0)
    assert [cluster.retry(0) for _ in range(2)] == [True, False]
    for _ in range(10_000):
        cluster.success(0)
    assert cluster.bucket.available == 28
    assert cluster.shares[0].tokens <= 14, "and the price of one retry"


def test_the_first_to_ask_does_not_take_all() -> None:
    cluster = Cluster(4)
    assert [cluster.retry(process) for process in range(4)] == [True] * 4


@pytest.mark.parametrize("processes", [1, 5, 50])
@pytest.mark.parametrize("failing", [1.0, 0.1])
def test_case_11_at_most_one_call_in_a_hundred_decisions_and_tokens_are_conserved(
    processes: int, failing: float
) -> None:
    cluster = Cluster(processes, seed=processes)
    for _ in range(1_000 * processes):
        process = cluster.rng.randrange(processes)
        if cluster.rng.random() < failing:
            cluster.retry(process)
        else:
            cluster.success(process)
    assert cluster.calls <= cluster.decisions / 100
    assert cluster.spent <= 500 + cluster.successes
    held = sum(share.tokens for share in cluster.shares) + cluster.bucket.available
    assert held <= 500 + cluster.successes - cluster.spent + 1e-6


def test_case_11_steady_extra_load_is_bounded_to_about_seven_percent() -> None:
    cluster = Cluster(10)
    for _ in range(50_000):
        process = cluster.rng.randrange(10)
        if cluster.rng.random() < 0.5:  # half of all calls fail, and every failure would like a retry
            cluster.retry(process)
        else:
            cluster.success(process)
    assert cluster.retries <= 500 / 14 + cluster.successes / 14
    assert cluster.retries >= 0.9 * cluster.successes / 14, "the budget is used, not only bounded"


def test_a_dead_service_gets_a_bucket_of_retries_from_all_processes_together() -> None:
    cluster = Cluster(50)
    for _ in range(200):
        for process in range(50):
            cluster.retry(process)
    assert cluster.retries <= 500 // 14
    assert cluster.calls <= cluster.decisions / 50


def test_without_an_answer_a_share_goes_on_with_a_tenth_of_the_bucket_in_all() -> None:
    cluster = Cluster(1, lost=1.0)
    for _ in range(5_000):
        cluster.retry(0)
    assert cluster.spent <= 50
    cluster.lost = 0.0
    before = cluster.spent
    for _ in range(200):
        cluster.retry(0)
    assert cluster.spent <= 500, "what was spent without an answer is told"
    assert cluster.spent > before


@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_of_losses_and_deaths_spends_more_than_there_is(seed: int) -> None:
    cluster = Cluster(8, seed=seed, lost=0.3)
    for _ in range(5_000):
        process = cluster.rng.randrange(8)
        if cluster.rng.random() < 0.002:
            cluster.shares[process] = Share(DEFAULTS)  # a process died with its share; another takes its place
        if cluster.rng.random() < cluster.rng.choice([0.02, 0.9]):
            cluster.retry(process, throttled=cluster.rng.random() < 0.2)
        else:
            cluster.success(process)
    debts = sum(50 for _ in range(8 + 5_000 // 400))  # credit of living processes, and of those that died with one
    assert cluster.spent <= 500 + cluster.successes + debts


def test_newer_settings_keep_what_is_gone_in_proportion() -> None:
    bucket = Bucket(BudgetSettings(tokens=100))
    bucket.exchange(0, wants=True)
    left = bucket.available
    bucket.configure(BudgetSettings(tokens=1_000))
    assert bucket.available == pytest.approx(10 * left)
