//! Many short runs, and those that once found a bug of the engine.

use drbd_sim::scenario::Scenario;
use drbd_sim::shrink::judge;

fn is_fine(seed: u64) {
    let violation = judge(&Scenario::new(seed), false).violation;
    assert_eq!(violation, None, "seed {seed}; `cargo sim --start {seed} --seeds 1` tells more");
}

/// `SIM_SEEDS`: how many.
#[test]
fn nothing_goes_wrong() {
    let given = std::env::var("SIM_SEEDS").ok().and_then(|text| text.parse().ok());
    for seed in 0..given.unwrap_or(60) {
        is_fine(seed);
    }
}

#[test]
fn a_primary_may_be_the_target() {
    for seed in 0..20 {
        let violation = judge(&Scenario::primary_as_target(seed), false).violation;
        assert_eq!(violation, None, "seed {seed}");
    }
}

macro_rules! found_by {
    ($($name:ident: $seed:literal;)*) => {
        $(#[test]
        fn $name() {
            is_fine($seed);
        })*
    };
}

found_by! {
    remote_reads_end_with_a_suspension: 5;
    a_lost_connection_has_no_deadlines: 21;
    references_end_with_their_disk: 37;
    what_an_earlier_process_wrote_is_flushed_at_attach: 38;
    without_activity_log_a_lost_disk_is_copied_whole: 69;
    no_ack_no_cleared_bits: 73;
    a_partly_superseded_write_is_marked: 81;
    suspended_writes_of_a_bad_disk_start_again: 110;
    a_source_leaves_a_resync_with_failed_blocks: 118;
    resume_io_makes_every_generation: 145;
    demotion_waits_for_the_peer: 182;
    old_writes_of_a_lost_primary_are_dropped: 183;
    a_source_with_a_stale_block_is_not_up_to_date: 264;
    a_primary_that_lost_its_data_is_demoted: 292;
    demotion_flushes_the_own_disk: 416;
    a_disk_lost_while_alone_is_copied_whole: 608;
    a_frozen_flush_does_not_keep_the_bitmap_back: 750;
    a_slow_resync_is_not_stuck: 801;
    a_write_of_the_peer_waits_for_all_that_it_meets: 895;
    a_frozen_victim_of_a_split_brain_is_thawed: 971;
    below_version_100_a_superseded_write_is_done_again: 1024;
    a_failed_flush_takes_its_epoch_back: 1152;
    the_loser_by_a_policy_does_not_become_the_source: 1178;
    what_congestion_kept_back_is_reported_again: 1237;
    a_failed_disk_is_announced_before_the_only_copy: 1253;
    a_primary_with_older_data_is_demoted: 1268;
    an_ack_that_comes_late_clears_no_newer_mark: 1295;
    an_empty_epoch_is_not_acknowledged: 1391;
    a_frozen_conflict_does_not_keep_the_bitmap_back: 1423;
    an_acknowledged_write_on_a_slow_disk_is_no_conflict: 1473;
    the_victim_of_a_split_brain_is_told: 1724;
    a_refused_attach_does_not_become_up_to_date: 1895;
    a_frozen_generation_begins_with_a_diskless_peer: 1961;
    no_volume_writes_alone_while_another_shakes_hands: 2195;
    a_packet_that_crosses_an_attach_is_no_answer: 2670;
    a_suspension_outlasts_all_handshakes: 2773;
    a_promotion_ends_before_a_handshake: 2813;
    a_fenced_sync_target_is_no_new_generation: 2815;
    every_volume_has_its_generation_before_requests_end: 3488;
    resume_io_waits_for_the_end_of_a_handshake: 3673;
    a_retried_write_does_not_hold_the_receiver: 3818;
    the_log_counts_until_the_bitmap_is_written: 3823;
    an_acknowledged_epoch_outlasts_a_suspension: 4180;
    a_source_keeps_no_bits_of_a_write_that_is_done_again: 4531;
    equal_checksums_are_flushed_before_bits_are_cleared: 4577;
    to_be_outdated_makes_no_disk_better: 4892;
    a_source_leaves_a_resync_that_never_asked: 5034;
    all_volumes_begin_a_generation_if_the_peer_is_sent_away: 5647;
    a_write_that_gives_way_stays_hot_until_it_is_done_again: 5928;
    equal_disks_after_a_crash_of_old_versions_need_secondaries: 5951;
    who_pulls_ahead_sends_no_sync_uuid: 5986;
    a_diskless_primary_may_refuse_the_only_disk: 6060;
    a_write_that_is_done_again_is_marked: 8779;
    writes_without_activity_log_are_flushed_before_a_resync: 9176;
    the_base_of_a_resync_stays_in_the_history: 9306;
    what_only_newer_protocols_correct_gets_new_meta_data: 9365;
    a_primary_that_attaches_alone_begins_a_generation: 9674;
    a_failed_disk_sends_no_sync_uuid: 11801;
    answers_for_a_lost_disk_do_not_lock_extents: 12609;
    another_number_of_extents_forgets_no_bits: 14147;
    a_primary_that_attaches_after_a_failure_begins_a_generation: 14205;
    a_refused_attach_gets_new_meta_data: 14599;
    a_target_that_does_not_know_of_its_resync_is_unclear: 16280;
    a_disk_is_attached_before_it_is_outdated: 17537;
    two_attaches_at_a_time_want_different_sides: 17939;
    a_slow_read_may_outlast_the_start_of_a_resync: 18409;
    unrelated_data_gets_new_meta_data: 19746;
    a_write_on_its_way_is_in_the_log_of_a_new_disk: 21720;
    a_verify_makes_no_disk_good: 28371;
    the_older_data_gets_new_meta_data: 30616;
    a_forced_promotion_counts_when_it_is_carried_out: 33983;
    frozen_writes_do_not_count_on_a_disk_that_is_gone: 36337;
    a_write_on_a_failed_disk_is_no_copy: 39306;
    a_frozen_write_is_made_again_on_the_disk_that_is_back: 40689;
    what_was_written_ahead_of_the_peer_is_newer: 40902;
    a_disk_that_is_given_up_keeps_its_buffers: 44381;
    what_starts_again_is_not_in_flight: 63852;
    a_disk_that_fails_while_ahead_leaves_no_good_data: 21234;
    a_start_that_waited_is_over_when_the_source_pulls_ahead: 66519;
    the_peer_is_told_what_did_not_come_of_its_consent: 66930;
    a_disk_is_attached_before_it_is_invalidated: 55126;
    a_failed_disk_does_not_become_better_by_being_outdated: 83110;
    two_changes_of_the_state_do_not_wait_for_each_other: 86234;
}
