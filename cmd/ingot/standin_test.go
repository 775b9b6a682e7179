package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// standIn is a program in the place of Firecracker, Cloud Hypervisor and virtiofsd,
// which cannot be had here: it takes their command lines as flintlock writes them,
// opens the taps that it is given, writes to its console, and lives. Cloud
// Hypervisor's answers the calls of its API that end a guest.
func standIn() {
	fmt.Println("guest ready")
	var taps []*os.File
	open := func(name string) {
		f, err := link.OpenTap(name)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		taps = append(taps, f)
	}
	if path := word("--config-file"); path != "" {
		for _, name := range configuredTaps(path) {
			open(name)
		}
	}
	if net := word("--net"); net != "" {
		open(strings.TrimPrefix(strings.Split(net, ",")[0], "tap="))
	}
	if socket := word("--api-socket"); socket != "" {
		serveAPI(socket)
	}
	for {
		unix.Pause()            // until a signal ends it
		runtime.KeepAlive(taps) // or they would be closed
	}
}

// word is what follows a word of the command line.
func word(name string) string {
	if i := slices.Index(os.Args, name); i >= 0 && i+1 < len(os.Args) {
		return os.Args[i+1]
	}
	return ""
}

// configuredTaps are those of a configuration file of Firecracker's.
func configuredTaps(path string) []string {
	var c struct {
		Interfaces []struct {
			Device string `json:"host_dev_name"`
		} `json:"network-interfaces"`
	}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var names []string
	for _, n := range c.Interfaces {
		names = append(names, n.Device)
	}
	return names
}

// serveAPI is Cloud Hypervisor's. What it is told stands in its log. A guest with the
// word deaf on its command line does not feel the power button.
func serveAPI(socket string) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var mu sync.Mutex
	state := "Running"
	say := func(what string) {
		f, err := os.OpenFile(word("--log-file"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err == nil {
			fmt.Fprintln(f, what)
			f.Close()
		}
	}
	http.HandleFunc("GET /api/v1/vm.info", func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(w, `{"state": %q}`, state)
	})
	http.HandleFunc("PUT /api/v1/vm.power-button", func(w http.ResponseWriter, _ *http.Request) {
		say("power button")
		w.WriteHeader(http.StatusNoContent)
		if !strings.Contains(word("--cmdline"), "deaf") {
			time.AfterFunc(20*time.Millisecond, func() { os.Exit(0) })
		}
	})
	http.HandleFunc("PUT /api/v1/vm.shutdown", func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		state = "Created"
		say("shut down")
		w.WriteHeader(http.StatusNoContent)
	})
	http.Serve(l, nil)
}
