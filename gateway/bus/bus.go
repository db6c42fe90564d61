// Package bus carries wake-ups between the parts of a gateway: "there is
// something new under this topic". What it carries may be lost or merged; the
// truth is in the database, which the one that was woken reads from where it
// left off. A live tail is therefore a loop of "read what is new, wait for a
// wake-up".
//
// [Local] serves one gateway in one process. Several gateways on one database
// need an implementation that crosses processes behind the same [Bus].
package bus

import "sync"

// Topic names what is new.
type Topic string

// Topics without an object.
const (
	Events   Topic = "events"   // events were stored
	Actions  Topic = "actions"  // an action changed its state
	Nodes    Topic = "nodes"    // a node changed its state
	RCPs     Topic = "rcps"     // an RCP changed its state, or the set of RCPs changed
	Targets  Topic = "targets"  // what a node should offer or said of its targets changed
	Forwards Topic = "forwards" // the set of forwards changed
)

// Action is the topic of one action: output or a new state.
func Action(id string) Topic { return Topic("action/" + id) }

// Batch is the topic of the actions that were asked for together.
func Batch(id string) Topic { return Topic("batch/" + id) }

// Bus is what the parts of a gateway need of it.
type Bus interface {
	// Wake tells the subscribers of topic. It never blocks.
	Wake(topic Topic)
	// Subscribe returns a channel that holds at most one wake-up, and a
	// function that ends the subscription; the channel is never closed. To
	// miss nothing, subscribe first and read the database then.
	Subscribe(topic Topic) (wakes <-chan struct{}, cancel func())
}

// Local is a Bus within one process. The zero value is ready.
type Local struct {
	mu   sync.Mutex
	subs map[Topic]map[chan struct{}]struct{}
}

var _ Bus = (*Local)(nil)

// Wake implements [Bus].
func (b *Local) Wake(topic Topic) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for ch := range b.subs[topic] {
		select {
		case ch <- struct{}{}:
		default: // a wake-up is waiting already
		}
	}
}

// Subscribe implements [Bus].
func (b *Local) Subscribe(topic Topic) (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.subs == nil {
		b.subs = make(map[Topic]map[chan struct{}]struct{})
	}
	if b.subs[topic] == nil {
		b.subs[topic] = make(map[chan struct{}]struct{})
	}
	b.subs[topic][ch] = struct{}{}
	return ch, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.subs[topic], ch)
		if len(b.subs[topic]) == 0 {
			delete(b.subs, topic)
		}
	}
}
