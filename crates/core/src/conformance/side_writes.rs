use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::MessageId;
use crate::completion::Completion;

pub(super) fn setup(setup: Setup) -> Setup {
    setup.short_lease()
}

/// A completion with an offset of a stream's first partition, and a message whose key is the offset.
fn completion(offset: u64) -> Completion {
    Completion::new("r").offset("orders", 0, offset).message("charges", offset.to_string(), "12 EUR")
}

pub(super) async fn offsets_and_messages_are_stored_with_their_completion(bench: &Bench) -> Verdict {
    let engine = &bench.engine;
    ensure_eq!(engine.offset(b"orders", 0).await?, None, "an offset that was never stored");
    ensure!(engine.outbox(10).await?.is_empty(), "the outbox of a new engine is not empty");
    let grant = bench.acquire("k").await?;
    let both = Completion::new("r")
        .offset("orders", 0, 16)
        .offset("orders", 300, 4)
        .offset("orders", 0, 17)
        .message("charges", "k", "12 EUR")
        .message("mails", "", "");
    bench.complete(&grant, both).await??;
    ensure_eq!(engine.offset(b"orders", 0).await?, Some(17), "the last offset of partition 0");
    ensure_eq!(engine.offset(b"orders", 300).await?, Some(4), "the offset of partition 300");
    ensure_eq!(engine.offset(b"order", 0).await?, None, "the offset of another stream");
    let messages = engine.outbox(10).await?;
    let texts: Vec<[&[u8]; 3]> = messages.iter().map(|it| [&it.topic[..], &it.key[..], &it.payload[..]]).collect();
    ensure_eq!(texts, [[&b"charges"[..], b"k", b"12 EUR"], [b"mails", b"", b""]], "the messages");
    Ok(())
}

pub(super) async fn an_offset_can_be_stored_without_a_completion(bench: &Bench) -> Verdict {
    let engine = &bench.engine;
    for offset in [18, 7, u64::MAX] {
        engine.set_offset(b"orders", u32::MAX, offset).await?;
        ensure_eq!(engine.offset(b"orders", u32::MAX).await?, Some(offset), "the last offset counts, not the highest");
    }
    ensure_eq!(engine.offset(b"orders", 0).await?, None, "the offset of another partition");
    let grant = bench.acquire("k").await?;
    bench.complete(&grant, Completion::new("r").offset("orders", u32::MAX, 3)).await??;
    ensure_eq!(engine.offset(b"orders", u32::MAX).await?, Some(3), "the offset of a completion");
    Ok(())
}

pub(super) async fn messages_are_listed_in_the_order_of_their_completions(bench: &Bench) -> Verdict {
    let first = bench.acquire("first").await?;
    let (a, b) = (bench.acquire("a").await?, bench.acquire("b").await?);
    let message = |key: &str| Completion::new("r").message("t", key, "");
    bench.complete_all(vec![(&b, message("1").message("t", "2", "")), (&a, message("3"))]).await?;
    bench.complete(&first, message("4")).await??;
    ensure_eq!(bench.outbox_keys().await?, ["1", "2", "3", "4"], "the messages");
    let all = bench.engine.outbox(10).await?;
    ensure!(all.is_sorted_by_key(|message| message.id), "the ids are not in order");
    for limit in 0..=4 {
        let some = bench.engine.outbox(limit).await?;
        ensure_eq!(some[..], all[..limit], "the first {limit} messages");
    }
    Ok(())
}

pub(super) async fn removed_messages_are_gone_and_unknown_ids_are_ignored(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let three = Completion::new("r").message("t", "1", "").message("t", "2", "").message("t", "3", "");
    bench.complete(&grant, three).await??;
    let messages = bench.engine.outbox(10).await?;
    ensure_eq!(messages.len(), 3, "the number of messages");
    let unknown = MessageId::new(messages[0].id.record() + 1_000_000, 0);
    bench.engine.remove_messages(vec![messages[1].id, unknown]).await?;
    bench.engine.remove_messages(vec![messages[1].id]).await?;
    ensure_eq!(bench.outbox_keys().await?, ["1", "3"], "the messages");
    bench.engine.remove_messages(vec![messages[0].id, messages[2].id]).await?;
    ensure!(bench.outbox_keys().await?.is_empty(), "a removed message is still there");
    Ok(())
}

pub(super) async fn a_rejected_completion_stores_no_side_writes(bench: &Bench) -> Verdict {
    let late = bench.acquire("k").await?;
    bench.expire_leases().await;
    let _second = bench.acquire("k").await?;
    ensure_superseded(&bench.complete(&late, completion(1)).await?, &late, "the completion")?;
    ensure_eq!(bench.engine.offset(b"orders", 0).await?, None, "the offset");
    ensure!(bench.outbox_keys().await?.is_empty(), "its message is stored");
    Ok(())
}

pub(super) async fn after_a_rejected_completion_its_call_stores_messages_and_no_offsets(bench: &Bench) -> Verdict {
    let late = bench.acquire("2").await?;
    bench.expire_leases().await;
    let _second = bench.acquire("2").await?;
    let (a, c) = (bench.acquire("1").await?, bench.acquire("3").await?);
    let batch = vec![(&a, completion(1)), (&late, completion(2)), (&c, completion(3))];
    let answers = bench.complete_all(batch).await?;
    ensure_matches!(answers[..], [Ok(()), Err(crate::Error::Superseded { .. }), Ok(())], "the answers");
    ensure_eq!(bench.engine.offset(b"orders", 0).await?, Some(1), "the offset before the rejected completion");
    ensure_eq!(bench.outbox_keys().await?, ["1", "3"], "the messages");
    bench.completed("3").await?;
    let next = bench.acquire("4").await?;
    bench.complete(&next, completion(4)).await??;
    ensure_eq!(bench.engine.offset(b"orders", 0).await?, Some(4), "the offset of the next call");
    Ok(())
}
