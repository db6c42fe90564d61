package main

import (
	"errors"
	"os/exec"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func walk(cmd *cobra.Command, f func(path, short string, runnable, checked bool)) {
	f(cmd.CommandPath(), cmd.Short, cmd.Runnable(), cmd.Args != nil || len(cmd.ValidArgs) > 0)
	for _, c := range cmd.Commands() {
		walk(c, f)
	}
}

func walkFlags(cmd *cobra.Command, f func(path, name, form string)) {
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		form, _ := pflag.UnquoteUsage(flag)
		f(cmd.CommandPath(), flag.Name, form)
	})
	for _, c := range cmd.Commands() {
		walkFlags(c, f)
	}
}

func exitCode(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return strconv.Itoa(exit.ExitCode())
	}
	return err.Error()
}
