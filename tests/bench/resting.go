package main

import (
	"context"
	"time"
)

// memory measures what parties take that have nothing to do: an RCP before the
// first node, a node agent with an empty desired state, each after a rest. The
// slim programs, as they are deployed.
func (b *bench) memory(ctx context.Context) error {
	rest := 45 * time.Second // the gateway closes an idle session after that
	if b.quick {
		rest = 2 * time.Second
	}
	s, err := b.newSite(ctx, "memory", 1)
	if err != nil {
		return err
	}
	defer func() { b.closing(s.close()) }()
	b.say("memory: an RCP without nodes rests for %v", rest/3)
	if err := pause(ctx, rest/3); err != nil {
		return err
	}
	note := func(p *process, rss, anonymous string) error {
		m, err := memoryOf(p.pid())
		if err != nil {
			return err
		}
		b.say("memory: %s: RSS %.1f MiB, anonymous %.1f MiB", p.name, mib(m.RSS), mib(m.Anonymous))
		if rss != "" {
			b.put(rss, mib(m.RSS))
		}
		b.put(anonymous, mib(m.Anonymous))
		return nil
	}
	if err := note(s.rcp.process, "memory.rcp.rss", "memory.rcp.anonymous"); err != nil {
		return err
	}
	if err := s.startNode(ctx); err != nil {
		return err
	}
	b.say("memory: a node rests for %v", rest)
	if err := pause(ctx, rest); err != nil {
		return err
	}
	if err := note(s.node, "memory.node.rss", "memory.node.anonymous"); err != nil {
		return err
	}
	return note(s.gateway, "", "memory.gateway.anonymous")
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

func kib(n int64) float64 { return float64(n) / (1 << 10) }
