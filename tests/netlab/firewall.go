package netlab

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
)

// Traffic is what a Cut stops.
type Traffic string

// The kinds of traffic.
const (
	UDP Traffic = "udp"
	TCP Traffic = "tcp"
	All Traffic = "all"
)

// Count is what a counter of the router saw.
type Count struct {
	Packets int64
	Bytes   int64
}

// Counters are the router's: what it dropped, by the network whose rule it broke.
type Counters struct {
	Inbound  map[string]Count // packets that began a connection into a NoInbound network
	Outbound map[string]Count // packets that began a connection out of a NoOutbound network
	Stray    Count            // packets of no connection that the router knows: neither begun nor answered
	Passed   Count            // packets that began a connection and were let through
}

// Violations returns one line for each counter of a rule that is not zero.
func (c Counters) Violations() []string {
	var lines []string
	for name, n := range c.Inbound {
		if n.Packets > 0 {
			lines = append(lines, fmt.Sprintf("%d packets tried to begin a connection into %s", n.Packets, name))
		}
	}
	for name, n := range c.Outbound {
		if n.Packets > 0 {
			lines = append(lines, fmt.Sprintf("%d packets tried to begin a connection out of %s", n.Packets, name))
		}
	}
	return lines
}

// cut stops traffic between two networks in both directions; a < b.
type cut struct {
	a, b    string
	traffic Traffic
}

const table = "inet netlab"

// loadRules installs the whole rule set. It hangs on prerouting, behind
// connection tracking (-200): there it sees every packet that a host sends,
// whether it is meant for another host, for the router or for nobody.
func (l *Lab) loadRules(ctx context.Context) error {
	var b strings.Builder
	fmt.Fprintf(&b, "table %s {\n\tcounter stray {}\n\tcounter passed {}\n", table)
	for _, n := range l.nets {
		fmt.Fprintf(&b, "\tcounter into_%s {}\n\tcounter out_of_%s {}\n", n.Name, n.Name)
	}
	b.WriteString("\tchain cuts {}\n\tchain border {\n\t\ttype filter hook prerouting priority -150; policy accept;\n")
	b.WriteString("\t\tiifname \"lo\" accept\n\t\tjump cuts\n")
	b.WriteString("\t\tct state established,related accept\n\t\tct state invalid counter name stray drop\n")
	for _, n := range l.nets {
		// Neighbours, but not the router, which has an address in each /30.
		var own []string
		for _, name := range n.Hosts {
			own = append(own, l.hosts[name].addr.String())
		}
		if len(own) > 0 {
			fmt.Fprintf(&b, "\t\tip saddr %s ip daddr { %s } accept\n", n.subnet, strings.Join(own, ", "))
		}
	}
	// A packet that breaks two rules is counted for both, then dropped.
	var drops strings.Builder
	for _, n := range l.nets {
		if n.Policy&NoOutbound != 0 {
			fmt.Fprintf(&b, "\t\tip saddr %s counter name out_of_%s\n", n.subnet, n.Name)
			fmt.Fprintf(&drops, "\t\tip saddr %s drop\n", n.subnet)
		}
		if n.Policy&NoInbound != 0 {
			fmt.Fprintf(&b, "\t\tip daddr %s counter name into_%s\n", n.subnet, n.Name)
			fmt.Fprintf(&drops, "\t\tip daddr %s drop\n", n.subnet)
		}
	}
	b.WriteString(drops.String())
	b.WriteString("\t\tcounter name passed accept\n\t}\n}\n")
	if err := l.nft(ctx, b.String()); err != nil {
		return err
	}
	return inNamespace(l.router, func() error {
		// A packet in the middle of a TCP connection that the router has
		// forgotten is stray; by default it would count as a new connection.
		return set("net/netfilter/nf_conntrack_tcp_loose", "0")
	})
}

func (l *Lab) nft(ctx context.Context, rules string) error {
	_, err := run(ctx, rules, "ip", "netns", "exec", l.router, nftPath(), "-f", "-")
	return err
}

func nftPath() string {
	p, err := find("nft")
	if err != nil {
		return "nft" // Available was asked before; this names the program in the error
	}
	return p
}

// Cut drops traffic between two networks, in both directions and in the middle
// of what runs, until Restore.
func (l *Lab) Cut(ctx context.Context, a, b string, traffic Traffic) error {
	return l.setCut(ctx, a, b, traffic, true)
}

// Restore ends a Cut.
func (l *Lab) Restore(ctx context.Context, a, b string, traffic Traffic) error {
	return l.setCut(ctx, a, b, traffic, false)
}

func (l *Lab) setCut(ctx context.Context, a, b string, traffic Traffic, on bool) error {
	for _, name := range []string{a, b} {
		if _, err := l.network(name); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := cut{a: min(a, b), b: max(a, b), traffic: traffic}
	if on {
		l.cuts[c] = struct{}{}
	} else {
		delete(l.cuts, c)
	}
	// One transaction: there is no moment in which neither the old nor the
	// new rules hold.
	var rules strings.Builder
	fmt.Fprintf(&rules, "flush chain %s cuts\n", table)
	for c := range l.cuts {
		x, err := l.network(c.a)
		if err != nil {
			return err
		}
		y, err := l.network(c.b)
		if err != nil {
			return err
		}
		match := ""
		if c.traffic != All {
			match = "meta l4proto " + string(c.traffic) + " "
		}
		fmt.Fprintf(&rules, "add rule %s cuts ip saddr %s ip daddr %s %sdrop\n", table, x.subnet, y.subnet, match)
		fmt.Fprintf(&rules, "add rule %s cuts ip saddr %s ip daddr %s %sdrop\n", table, y.subnet, x.subnet, match)
	}
	return l.nft(ctx, rules.String())
}

// Counters reads the router's counters.
func (l *Lab) Counters(ctx context.Context) (Counters, error) {
	out, err := run(ctx, "", "ip", "netns", "exec", l.router, nftPath(), "-j", "list", "counters", "table", "inet", "netlab")
	if err != nil {
		return Counters{}, err
	}
	var list struct {
		NFTables []struct {
			Counter *struct {
				Name    string `json:"name"`
				Packets int64  `json:"packets"`
				Bytes   int64  `json:"bytes"`
			} `json:"counter"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return Counters{}, fmt.Errorf("counters of the router: %w", err)
	}
	found := make(map[string]Count)
	for _, item := range list.NFTables {
		if c := item.Counter; c != nil {
			found[c.Name] = Count{Packets: c.Packets, Bytes: c.Bytes}
		}
	}
	counters := Counters{Inbound: make(map[string]Count), Outbound: make(map[string]Count)}
	read := func(name string) Count {
		c, ok := found[name]
		if !ok && err == nil {
			err = fmt.Errorf("the router has no counter %s", name)
		}
		return c
	}
	counters.Stray, counters.Passed = read("stray"), read("passed")
	for _, n := range l.nets {
		if n.Policy&NoInbound != 0 {
			counters.Inbound[n.Name] = read("into_" + n.Name)
		}
		if n.Policy&NoOutbound != 0 {
			counters.Outbound[n.Name] = read("out_of_" + n.Name)
		}
	}
	return counters, err
}
