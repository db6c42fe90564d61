package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// localRole finds the role on this host that a `local` verb speaks to.
type localRole struct {
	streams IO
	out     *Output
	roles   []wire.Role // that this program may hold, the likeliest first
	stopped Stopped
	choice  string // --role
}

// Stopped says why a role that does not run will not, and what to do; nothing where
// that is not known.
type Stopped func(ctx context.Context, env []string, role wire.Role) (why, fix string)

// LocalCommand is `local`: what a person on the host of a role may ask it. stopped
// may be nil.
func LocalCommand(out *Output, streams IO, stopped Stopped, roles ...wire.Role) *cobra.Command {
	l := &localRole{streams: streams, out: out, roles: roles, stopped: stopped}
	cmd := Group("local", "Speak to the role that runs on this host",
		l.statusCommand(), l.doctorCommand(), l.eventCommand(), l.unlockCommand(), l.joinCommand(), l.instanceCommand(), l.csrCommand(), l.certificateCommand(), l.rejoinCommand())
	if len(roles) > 1 {
		names := make([]string, len(roles))
		for i, r := range roles {
			names[i] = string(r)
		}
		cmd.PersistentFlags().StringVar(&l.choice, "role", "", "which role, when several run here: "+strings.Join(names, ", "))
		_ = cmd.RegisterFlagCompletionFunc("role", fixed(names...))
	}
	return cmd
}

// operator is the configuration with the directory where the roles are. An
// ordinary user who names none, and has none of its own, means the system's.
func (l *localRole) operator() (config.Operator, error) {
	c, err := config.LoadOperator(l.streams.Env)
	if err != nil || slices.ContainsFunc(l.streams.Env, func(v string) bool { return strings.HasPrefix(v, dataVariable) && v != dataVariable }) {
		return c, err
	}
	there := func(data string) (yes, hidden bool) {
		for _, r := range l.roles {
			_, err := os.Stat(filepath.Join(data, string(r)))
			yes, hidden = yes || err == nil, hidden || errors.Is(err, fs.ErrPermission)
		}
		return yes, hidden
	}
	// What is hidden is the system's, of which an error tells, and never his own: that is
	// the home of somebody else, whose environment he was given.
	own, _ := there(c.Data)
	if system, hidden := there(systemData); !own && (system || hidden) {
		l.streams.Env = append(slices.Clone(l.streams.Env), dataVariable+systemData)
		return config.LoadOperator(l.streams.Env)
	}
	return c, nil
}

const dataVariable = "SALLYPORT_DATA="

var systemData = config.SystemData // that a test replaces

// clients returns a client for each role that has a socket, or for the one that
// was asked for.
func (l *localRole) clients() ([]*local.Client, error) {
	c, err := l.operator()
	if err != nil {
		return nil, err
	}
	roles := l.roles
	if l.choice != "" {
		role, err := wire.ParseRole(l.choice)
		if err != nil {
			return nil, Usage("--role: %w", err)
		}
		roles = []wire.Role{role}
	}
	var found []*local.Client
	for _, r := range roles {
		path := local.SocketPath(c.Data, r)
		_, err := os.Stat(path)
		if errors.Is(err, fs.ErrPermission) {
			return nil, Fail(ExitFailed, "%w: let this user pass through %s, or run as root", err, c.Data)
		}
		if err == nil || len(roles) == 1 {
			found = append(found, local.NewClient(path))
		}
	}
	if len(found) == 0 {
		return nil, Fail(ExitFailed, "no role has its socket under %s: start one, or set SALLYPORT_DATA to its directory", c.Data)
	}
	return found, nil
}

// client returns the one client to change something with.
func (l *localRole) client() (*local.Client, error) {
	all, err := l.clients()
	if err != nil {
		return nil, err
	}
	if len(all) > 1 && l.choice == "" {
		return nil, Usage("several roles run here; choose one with --role")
	}
	return all[0], nil
}

// statuses asks every role found. A socket that was left behind by a role that
// was killed counts only when nothing else answers.
func (l *localRole) statuses(ctx context.Context) ([]local.Status, error) {
	all, err := l.clients()
	if err != nil {
		return nil, err
	}
	var out []local.Status
	var errs []error
	for _, c := range all {
		s, err := c.Status(ctx)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, s)
	}
	if len(out) == 0 {
		return nil, errors.Join(errs...)
	}
	return out, nil
}

func (l *localRole) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the state of the role on this host", Args: Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := l.statuses(cmd.Context())
			if err != nil {
				return err
			}
			if l.out.Format == FormatTable {
				for _, s := range all {
					l.describe(s)
				}
				return nil
			}
			t := Table{Columns: []string{"role", "id", "name", "fingerprint", "state", "reason", "outbox_depth", "outbox_dropped"}}
			for _, s := range all {
				t.Add(string(s.Role), string(s.ID), s.Name, s.Fingerprint, s.State, s.Reason, fmt.Sprint(s.Outbox.Depth), fmt.Sprint(s.Outbox.Dropped))
			}
			// One role is one object: that is the contract. Several are a list.
			if len(all) == 1 {
				return l.out.Print(all[0], t)
			}
			return l.out.Print(all, t)
		},
	}
}

func (l *localRole) describe(s local.Status) {
	line := func(key, value string) {
		if value != "" {
			l.out.Say("%-13s%s", key, Clean(value))
		}
	}
	line("role", string(s.Role))
	line("id", string(s.ID))
	line("name", s.Name)
	line("fingerprint", s.Fingerprint)
	line("state", strings.TrimSuffix(s.State+" ("+s.Reason+")", " ()"))
	line("version", s.Version)
	line("boot", s.Boot)
	line("trust domain", s.TrustDomain)
	line("certificate", Time(s.NotAfter))
	if s.Clock != nil {
		line("clock", fmt.Sprintf("%+.1f s against the gateway's at %s", s.Clock.Seconds, Time(s.Clock.Measured)))
	}
	line("listens", strings.Join(s.Listen, ", "))
	if s.Role != wire.RoleGateway {
		line("dials", or(strings.Join(s.DialTargets, ", "), "nobody"))
	}
	for _, u := range s.Upstreams {
		line("upstream", upstreamLine(u))
	}
	for _, i := range s.Instances {
		line("instance", fmt.Sprintf("%s %s, revision %s, %d policies%s", i.TrustDomain, i.State, or(i.AppliedRevision, "none"), len(i.Policies), prefixed(": ", i.Reason)))
	}
	for _, role := range slices.Sorted(maps.Keys(s.Peers)) {
		line("peers", fmt.Sprintf("%d %s", s.Peers[role], role))
	}
	if s.Role == wire.RoleNode {
		oldest := ""
		if s.Outbox.Oldest != nil {
			oldest = ", oldest " + Time(*s.Outbox.Oldest)
		}
		line("outbox", fmt.Sprintf("%d waiting, %d dropped%s", s.Outbox.Depth, s.Outbox.Dropped, oldest))
	}
}

func upstreamLine(u wire.UpstreamStatus) string {
	return fmt.Sprintf("%s %s%s%s%s", u.Address, u.State, prefixed(" over ", u.Carrier), prefixed(", dialled by ", u.Dialler), prefixed(": ", u.Error))
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

func (l *localRole) eventCommand() *cobra.Command {
	var e local.EventRequest
	var severity string
	send := &cobra.Command{
		Use: "send --severity S [--key K] [--object O] TEXT", Short: "Send an event; done when it is on disk", Args: Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := wire.ParseSeverity(severity)
			if err != nil {
				return Usage("--severity: %w", err)
			}
			e.Severity, e.Text = s, args[0]
			c, err := l.eventClient()
			if err != nil {
				return err
			}
			receipt, err := c.SendEvent(cmd.Context(), e)
			if err != nil {
				return err
			}
			t := Table{Columns: []string{"instance", "id", "spool", "seq"}}
			for _, p := range receipt.Stored {
				t.Add(p.Instance, string(p.ID), p.Spool, fmt.Sprint(p.Seq))
			}
			return l.out.Print(receipt, t)
		},
	}
	f := send.Flags()
	f.StringVar(&severity, "severity", "", "normal, warning, minor, major or critical")
	f.StringVar(&e.Key, "key", "", "events with one key are one event to an operator; without it they are never merged")
	f.StringVar(&e.Object, "object", "", "what the event is about")
	f.StringVar(&e.Application, "application", "", "who reports it")
	f.StringVar(&e.Instance, "instance", "", "trust domain of the gateway to tell; all without it")
	_ = send.RegisterFlagCompletionFunc("severity", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var names []string
		for _, s := range wire.Severities {
			names = append(names, string(s))
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	return Group("event", "Events of this host", send)
}

// eventClient prefers the node: only nodes have events.
func (l *localRole) eventClient() (*local.Client, error) {
	if l.choice == "" {
		only := *l
		only.choice = string(wire.RoleNode)
		return only.client()
	}
	return l.client()
}

func (l *localRole) unlockCommand() *cobra.Command {
	var instance string
	cmd := &cobra.Command{
		Use: "unlock [--instance TRUST-DOMAIN]", Short: "Let a locked node obey its gateway again", Args: Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := l.eventClient()
			if err != nil {
				return err
			}
			if err := c.Unlock(cmd.Context(), instance); err != nil {
				return err
			}
			l.out.Note("unlocked")
			return nil
		},
	}
	cmd.Flags().StringVar(&instance, "instance", "", "trust domain; not needed when only one is locked")
	return cmd
}

// maxCode bounds what is read as a join code.
const maxCode = 64 << 10

func (l *localRole) joinCommand() *cobra.Command {
	return &cobra.Command{
		Use: "join CODE-FILE|-", Short: "Enrol with the join code in a file, or on standard input", Args: Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.HasPrefix(args[0], wire.JoinPrefix) {
				return Usage("a join code on a command line is seen by every user of the host: put it into a file, or give it on standard input with -")
			}
			text, err := l.readCode(args[0])
			if err != nil {
				return err
			}
			code, err := wire.ParseJoinCode(text)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			only := *l
			if only.choice == "" && len(l.roles) > 1 {
				only.choice = string(code.Role)
			}
			c, err := only.client()
			if err != nil {
				return err
			}
			if err := c.Join(cmd.Context(), strings.TrimSpace(text)); err != nil {
				return err
			}
			l.out.Note("taken; `%s local status` says how the enrolment goes", cmd.Root().Name())
			return nil
		},
	}
}

func (l *localRole) readCode(name string) (string, error) {
	in := l.streams.In
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", fmt.Errorf("read join code: %w", err)
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxCode))
	if err != nil {
		return "", fmt.Errorf("read join code: %w", err)
	}
	return string(b), nil
}

func (l *localRole) instanceCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List the gateways that this node serves", Args: Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := l.eventClient()
			if err != nil {
				return err
			}
			all, err := c.Instances(cmd.Context())
			if err != nil {
				return err
			}
			t := Table{Columns: []string{"trust_domain", "name", "state", "reason", "applied_revision", "policies", "outbox", "not_after"}}
			for _, i := range all {
				t.Add(i.TrustDomain, i.Name, i.State, i.Reason, i.AppliedRevision, fmt.Sprint(len(i.Policies)), fmt.Sprint(i.Outbox.Depth), Time(i.NotAfter))
			}
			return l.out.Print(all, t)
		},
	}
	return Group("instance", "The gateways that this node serves", list)
}

// Age prints how long ago t was, in its largest unit.
func Age(t, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	switch d := now.Sub(t); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d/time.Second)))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d/time.Minute))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d/time.Hour))
	default:
		return fmt.Sprintf("%dd", int(d/(24*time.Hour)))
	}
}
