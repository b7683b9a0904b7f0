package main

// What the groups of commands show below their help: the usual ways of using
// them. Each line that begins with two spaces is a command that can be typed,
// and what it does. Without a paragraph before them, the first would be taken for
// one and be wrapped.

func (*tokenCmd) Help() string {
	return `For example:

  deimos token create --group attic --uses 20 --valid 72h    let 20 devices in, until in three days
  deimos token revoke fc1b48c126                             let nobody in by it any more`
}

func (*deviceCmd) Help() string {
	return `For example:

  deimos device list --group attic --state offline                 who of a group is away
  deimos device claim abcde-fghij-klmno --group attic              take in what shows this code
  deimos device set --label site=north --set-group roof            move devices into a group
  deimos device drain aaaabbbbccccddddeeeeffff --wait              bring elsewhere what one holds
  deimos device retire aaaabbbbccccddddeeeeffff --yes              send one away for ever`
}

func (*releaseCmd) Help() string {
	return `For example:

  deimos release build --version 0.2.0 --agent agent --out r-0.2.0  pack one
  deimos release show r-0.2.0                                       look at it, before it is signed
  deimos release show 0.2.0                                         what the fleet is offered, and who built it
  deimos release campaign start 0.2.0 --all --canary 5              bring it to devices, a few first
  deimos release status --watch                                     how far they are`
}

func (*orderCmd) Help() string {
	return `For example:

  deimos order list --pending                                      what has not ended yet
  deimos order list --device aaaabbbbccccddddeeeeffff              all that one device was asked
  deimos order send device.ping --group attic                      ask a group whether it is there`
}

func (*jobCmd) Help() string {
	return `For example:

  deimos job run wordcount.wasm --input text                       run over a stored file
  deimos job map thumbnail.wasm --over photos/ --out thumbs        run over each of many files
  seq 1 1000 | deimos job map prime.wasm --arg-file -              run with each line's arguments
  deimos job list --pending                                        what has not ended yet
  deimos job wait 01JD9W3B5XJ8Z6Q0M2T4R7V9YA                       wait for the end of one
  deimos job cancel 01JD9W3B5XJ8Z6Q0M2T4R7V9YA                     stop it`
}

func (*configCmd) Help() string {
	return `For example:

  deimos config set beat.seconds=60 --all                          for the whole fleet
  deimos config set jobs.slots=2 --group attic                     for a group
  deimos config show --device aaaabbbbccccddddeeeeffff             what one runs, and what it refuses
  deimos config list                                               who is behind`
}

func (*operatorCmd) Help() string {
	return `For example:

  deimos operator create carol --role viewer --out carol.json      carol may look, for 90 days
  deimos operator create ci --role release-manager --valid 30d     print the file
  deimos operator revoke carol                                     end it`
}

func (*logCmd) Help() string {
	return `For example:

  deimos log --since 7d --actor carol                              what carol did in a week
  deimos log --device aaaabbbbccccddddeeeeffff                     what became of one device
  deimos log --verify                                              was anything altered?`
}

func (*statusCmd) Help() string {
	return `For example:

  deimos status                                                    for people
  deimos status -o json                                            for programs`
}
