package cli

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/doctor"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

func (l *localRole) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Find what is wrong, and what to do about it", Args: Exactly(0),
		Long: "Find what is wrong with the role on this host, and what to do about it. A role that runs is asked; besides, and when\n" +
			"none runs, its files are looked at: a missing or corrupt certificate, key or trust, another CA, the clock, the name,\n" +
			"a full or read-only disk, and the addresses that it should reach. Exits with 1 when a check failed; warnings do not count.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			checks, err := l.examine(cmd.Context())
			if err != nil {
				return err
			}
			return l.tell(checks)
		},
	}
}

// examine looks at each role that has a directory here, or at the one that was
// asked for.
func (l *localRole) examine(ctx context.Context) ([]local.Check, error) {
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
	var here []wire.Role
	for _, r := range roles {
		_, err := os.Stat(c.Dir(string(r)))
		if errors.Is(err, fs.ErrPermission) {
			return nil, Fail(ExitFailed, "%w: run as the user that owns %s, or as root", err, c.Data)
		}
		if err == nil || len(roles) == 1 {
			here = append(here, r)
		}
	}
	if len(here) == 0 {
		for _, r := range []string{"pki", "signer"} {
			if _, err := os.Stat(c.Dir(r)); err == nil {
				return nil, Fail(ExitFailed, "in %s there is a %s only, which has no local verbs: its log tells, and the doctor of its gateway asks it", c.Data, r)
			}
		}
		return nil, Fail(ExitFailed, "no role has its directory under %s: start one, or set SALLYPORT_DATA to where they are", c.Data)
	}
	var out []local.Check
	for _, r := range here {
		checks, err := l.examineRole(ctx, c.Common, r)
		if err != nil {
			return nil, err
		}
		if len(here) > 1 {
			checks = doctor.Label(string(r), checks)
		}
		out = append(out, checks...)
	}
	return out, nil
}

func (l *localRole) examineRole(ctx context.Context, c config.Common, role wire.Role) ([]local.Check, error) {
	client := local.NewClient(local.SocketPath(c.Data, role))
	checks, err := client.Doctor(ctx)
	mute := errors.Is(err, local.ErrMute)
	running := err == nil || mute
	if mute {
		checks = []local.Check{{Check: "running", Detail: err.Error(), Fix: "see its log, and what its process and its disk do; start it anew if it stays so"}}
	} else if errors.Is(err, local.ErrNotRunning) {
		checks = []local.Check{l.notRunning(ctx, c, role)}
	} else if err != nil {
		return nil, err
	}
	checks = append(checks, l.files(c, role, running)...)
	checks = append(checks, l.disks(c, role)...)
	if mute {
		return checks, nil
	}
	for _, addr := range l.toReach(ctx, client, role, running) {
		checks = append(checks, doctor.Reach(ctx, addr))
	}
	return checks, nil
}

func (l *localRole) notRunning(ctx context.Context, c config.Common, role wire.Role) local.Check {
	found := local.Check{Check: "running", Detail: "no " + string(role) + " runs in " + c.Dir(string(role)),
		Fix: "start it (`sallyport run " + string(role) + "`); if it ends at once, its last words on stderr or in the journal say why"}
	if l.stopped != nil {
		if why, fix := l.stopped(ctx, l.streams.Env, role); why != "" {
			found.Detail, found.Fix = found.Detail+": "+why, fix
		}
	}
	return found
}

// files are the findings about what is on disk. An ordinary user who asks a
// role that runs may not read them, and need not.
func (l *localRole) files(c config.Common, role wire.Role, running bool) (checks []local.Check) {
	dirs := map[string]string{"": filepath.Join(c.Dir(string(role)), "identity")}
	if role == wire.RoleNode {
		if _, err := os.ReadDir(c.Dir(string(role))); errors.Is(err, fs.ErrPermission) && !running { // a pattern finds nothing then
			return []local.Check{{Check: "identity", Detail: err.Error(), Fix: "run as the user that owns " + c.Dir(string(role)) + ", or as root"}}
		}
		found, err := filepath.Glob(filepath.Join(c.Dir(string(role)), "*", "identity"))
		if err != nil || len(found) == 0 {
			return nil // it has met no gateway
		}
		clear(dirs)
		for _, d := range found {
			word := ""
			if len(found) > 1 {
				word = filepath.Base(filepath.Dir(d))
			}
			dirs[word] = d
		}
	}
	now := time.Now()
	for word, dir := range dirs {
		if running && !doctor.Readable(dir) {
			continue
		}
		checks = append(checks, doctor.Label(word, append(doctor.Identity(dir, role, now), doctor.State(filepath.Dir(dir), role)...))...)
		if role == wire.RoleGateway {
			if g, err := config.LoadGateway(l.streams.Env); err == nil && !running { // one that runs has looked itself
				checks = append(checks, doctor.Database(g.Database, dir)...)
			}
			checks = append(checks, doctor.Authority(c.Dir("pki"), dir, now)...)
			checks = append(checks, doctor.Restoration(c.Dir(string(role)))...)
		}
	}
	return checks
}

// disks are the findings about where the role writes, and whose that is.
func (l *localRole) disks(c config.Common, role wire.Role) []local.Check {
	dirs, own := []string{c.Dir(string(role))}, []string{c.Dir(string(role))}
	if role == wire.RoleGateway {
		if g, err := config.LoadGateway(l.streams.Env); err == nil && !strings.Contains(g.Database, "://") {
			dirs = append(dirs, filepath.Dir(g.Database))
		}
		dirs, own = append(dirs, c.Dir("pki")), append(own, c.Dir("pki"))
	}
	return slices.Concat(doctor.Disks(dirs...), doctor.Above(c.Data), doctor.Owners(own...))
}

// toReach lists the addresses that the role dials and is not connected with.
// Behind an HTTP proxy a connection of our own says nothing.
func (l *localRole) toReach(ctx context.Context, client *local.Client, role wire.Role, running bool) (out []string) {
	if os.Getenv("HTTPS_PROXY") != "" || os.Getenv("https_proxy") != "" {
		return nil
	}
	if running {
		s, err := client.Status(ctx)
		if err != nil {
			return nil
		}
		for _, u := range s.Upstreams {
			if u.Dialler == "us" && u.State != "connected" {
				out = append(out, u.Address)
			}
		}
		return out
	}
	var all config.Endpoints
	switch role {
	case wire.RoleNode:
		if c, err := config.LoadNode(l.streams.Env); err == nil {
			all = c.Upstreams
		}
	case wire.RoleRCP:
		if c, err := config.LoadRCP(l.streams.Env); err == nil {
			all = append(append(all, c.Upstreams...), c.Downstreams...)
		}
	case wire.RoleGateway:
		if c, err := config.LoadGateway(l.streams.Env); err == nil {
			all = c.RCPs
		}
	}
	for _, e := range all {
		if e.Addr != "" {
			out = append(out, e.Addr)
		}
	}
	return out
}

// tell prints the findings; one that failed is an error.
func (l *localRole) tell(checks []local.Check) error {
	t := Table{Columns: []string{"check", "ok", "detail", "fix"}}
	bad := 0
	for _, c := range checks {
		verdict := "ok"
		switch {
		case !c.OK:
			verdict = "failed"
			bad++
		case c.Warning:
			verdict = "warning"
		}
		t.Add(c.Check, verdict, c.Detail, c.Fix)
		if l.out.Format == FormatTable { // sentences: a table would be too wide to read
			l.out.Say("%-7s %s: %s", verdict, c.Check, Clean(c.Detail))
			if c.Fix != "" && verdict != "ok" {
				l.out.Say("        %s", Clean(c.Fix))
			}
		}
	}
	if l.out.Format != FormatTable {
		if err := l.out.Print(checks, t); err != nil {
			return err
		}
	}
	if bad > 0 {
		return Fail(ExitFailed, "%d of %d checks failed", bad, len(checks))
	}
	return nil
}
