package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/wire"
)

// Root prepares the top of a program: no noise of cobra's own, usage errors
// that exit with 2, and unknown SALLYPORT_ variables refused before any work.
func Root(use, short, long string, streams IO) *cobra.Command {
	root := Group(use, short)
	root.Long = long
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Usage("%w", err) })
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if skipsEnvironment(cmd) {
			return nil
		}
		return config.Known(streams.Env)
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	return root
}

// skipsEnvironment names the commands that must work whatever the environment
// holds: those that help to find out what is wrong with it.
func skipsEnvironment(cmd *cobra.Command) bool {
	path := strings.Fields(cmd.CommandPath())
	if len(path) < 2 {
		return true
	}
	switch path[1] {
	case "help", "version", "completion", "config", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd:
		return true
	}
	return false
}

// Group is a noun: without a verb of its own, it says which there are.
func Group(use, short string, verbs ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{
		Use: use, Short: short,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				if cmd.HasParent() {
					return Usage("%ssay what to do: %s", at(cmd), strings.Join(verbsOf(cmd), ", "))
				}
				return cmd.Help()
			}
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				return Usage("%sunknown command %q; did you mean %s?", at(cmd), args[0], strings.Join(near, " or "))
			}
			return Usage("%sunknown command %q; there are %s", at(cmd), args[0], strings.Join(verbsOf(cmd), ", "))
		},
		SuggestionsMinimumDistance: 2,
	}
	g.AddCommand(verbs...)
	return g
}

// at names a command below the program, whose own name begins every message.
func at(cmd *cobra.Command) string {
	if !cmd.HasParent() {
		return ""
	}
	return strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ") + ": "
}

func verbsOf(cmd *cobra.Command) []string {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return names
}

// Exactly, AtLeast and AtMost count arguments; a wrong number is a usage error
// that shows the form.
func Exactly(n int) cobra.PositionalArgs { return counted(cobra.ExactArgs(n)) }

// AtLeast refuses fewer than n arguments.
func AtLeast(n int) cobra.PositionalArgs { return counted(cobra.MinimumNArgs(n)) }

// Between refuses fewer than lo and more than hi arguments.
func Between(lo, hi int) cobra.PositionalArgs { return counted(cobra.RangeArgs(lo, hi)) }

func counted(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return Usage("%w: want `%s`", err, cmd.UseLine())
		}
		return nil
	}
}

// DurationFlag is a flag in the form of [wire.ParseDuration].
type DurationFlag struct{ wire.Duration }

// Set reads the flag.
func (d *DurationFlag) Set(s string) error { return d.UnmarshalText([]byte(s)) }

// Type names the form in --help.
func (d *DurationFlag) Type() string { return "duration" }
