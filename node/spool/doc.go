// Package spool keeps a node's events on disk until the gateway has them
// (EV-02, N-04).
//
// A spool is a directory of append-only segments. An event is acknowledged to
// its sender once its segment is fsynced; many senders share one fsync. Records
// carry a CRC, so that a torn tail is told from data, and a position that never
// repeats. A seq, the number that the gateway sees, is position − base: when a
// watermark shows that this spool was taken back to an older state (a restored
// snapshot), a new spool id with another base is written in the header of one
// new segment, and every kept event has a new place without being copied.
//
// The quota drops the lowest severity first, oldest segment first. A dropped
// event leaves its position to a gap record, which travels to the gateway as
// every event does: nothing is lost silently.
//
// Order of durable steps: data before acknowledgement, a new segment's header
// and directory entry before its first acknowledged record, a rewritten
// segment's data before the rename that shows it. What a crash may leave behind
// in between is put right by [Open].
package spool
