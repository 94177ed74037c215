# fish completion for shifter, shifterimg, shifterctl, setupRoot and unsetupRoot

# The images that the user may use: the first column of "shifterimg images" without its head.
function __shifter_images
    shifterimg images 2>/dev/null | string match -r '^\S+:\S+'
end

# Print the words of the command line from the first one that is no option of shifter.
function __shifter_command
    set -l words (commandline -opc)
    set -e words[1]
    while set -q words[1]
        switch $words[1]
            case --
                set -e words[1]
                break
            case --image --volume --module --env --env-file -i -V -m -e
                set -e words[1..2]
            case '-*'
                set -e words[1]
            case '*'
                break
        end
    end
    string join \n -- $words
end

# Complete that command as if it stood alone.
function __shifter_complete_command
    complete -C (string join ' ' -- (string escape -- (__shifter_command)) (commandline -ct))
end

function __shifter_in_options
    test -z "$(__shifter_command)"
end

complete -c shifter -f -n 'not __shifter_in_options' -a '(__shifter_complete_command)'
complete -c shifter -f -n __shifter_in_options -a '(__fish_complete_command)'
complete -c shifter -n __shifter_in_options -s h -l help -d 'Show help'
complete -c shifter -n __shifter_in_options -l version -d 'Show the version'
complete -c shifter -n __shifter_in_options -s v -l verbose -d 'Say what is done'
complete -c shifter -n __shifter_in_options -s i -l image -x -a '(__shifter_images)' -d 'Run in this image'
complete -c shifter -n __shifter_in_options -s V -l volume -x -a '(__fish_complete_directories)' -d 'Mount a directory: FROM:TO[:ro]'
complete -c shifter -n __shifter_in_options -l entrypoint -d 'Run the entry point of the image'
complete -c shifter -n __shifter_in_options -l entry -d 'Same as --entrypoint'
complete -c shifter -n __shifter_in_options -s w -l workdir -d 'Start in a directory: --workdir=PATH'
complete -c shifter -n __shifter_in_options -s m -l module -x -a none -d 'Use site modules'
complete -c shifter -n __shifter_in_options -s e -l env -x -a '(set -nx)=' -d 'Set an environment variable'
complete -c shifter -n __shifter_in_options -l env-file -r -d 'Set environment variables from a file'
complete -c shifter -n __shifter_in_options -s E -l clearenv -d 'Start from an empty environment'

set -l commands import images lookup inspect rm
complete -c shifterimg -f
complete -c shifterimg -n "not __fish_seen_subcommand_from $commands" -a import -d 'Make an image'
complete -c shifterimg -n "not __fish_seen_subcommand_from $commands" -a images -d 'List images'
complete -c shifterimg -n "not __fish_seen_subcommand_from $commands" -a lookup -d 'Print an identifier'
complete -c shifterimg -n "not __fish_seen_subcommand_from $commands" -a inspect -d 'Show what is known'
complete -c shifterimg -n "not __fish_seen_subcommand_from $commands" -a rm -d 'Remove an image'
complete -c shifterimg -n '__fish_seen_subcommand_from import' -F
complete -c shifterimg -n '__fish_seen_subcommand_from import' -l format -x -a 'squashfs erofs' -d 'Format of the image file'
complete -c shifterimg -n '__fish_seen_subcommand_from import' -l user -x -a '(__fish_complete_users)' -d 'Users who may run it'
complete -c shifterimg -n '__fish_seen_subcommand_from import' -l group -x -a '(__fish_complete_groups)' -d 'Groups that may run it'
complete -c shifterimg -n '__fish_seen_subcommand_from images inspect' -l json -d 'Print JSON'
complete -c shifterimg -n '__fish_seen_subcommand_from lookup inspect rm' -a '(__shifter_images)'

set -l commands config doctor gc logs plan ps release udi-image
complete -c shifterctl -f
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a config -d 'Check or show udiRoot.conf'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a gc -d 'Take down what is idle'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a doctor -d 'Look at Slurm on this node'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a logs -d 'Show what the sshd of a job said'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a plan -d 'Show what a launch would do'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a ps -d 'List UDIs'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a release -d 'Take down what holds a path'
complete -c shifterctl -n "not __fish_seen_subcommand_from $commands" -a udi-image -d 'Show the OpenSSH for containers'
complete -c shifterctl -n '__fish_seen_subcommand_from doctor' -l slurm -d 'Look at Slurm'
complete -c shifterctl -n '__fish_seen_subcommand_from doctor' -l quiet -d 'Only what is wrong'
complete -c shifterctl -n '__fish_seen_subcommand_from gc' -l all -d Everything
complete -c shifterctl -n '__fish_seen_subcommand_from gc' -l keep-images -d 'Leave images mounted'
complete -c shifterctl -n '__fish_seen_subcommand_from logs' -l job -x -a '(__shifter_jobs)' -d 'Of this job'
complete -c shifterctl -n '__fish_seen_subcommand_from plan udi-image' -l json -d 'Print JSON'
complete -c shifterctl -n '__fish_seen_subcommand_from ps' -l json -d 'Print JSON'
complete -c shifterctl -n '__fish_seen_subcommand_from ps' -l path -r -F -d 'Only UDIs that hold it'
complete -c shifterctl -n '__fish_seen_subcommand_from release' -F
complete -c shifterctl -n '__fish_seen_subcommand_from config' -a 'check show' -F
complete -c shifterctl -n '__fish_seen_subcommand_from config' -l json -d 'Print JSON'

# The jobs that are set up on this node.
function __shifter_jobs
    ls /run/shifter/jobs 2>/dev/null
end

# What is still missing of TYPE and IDENTIFIER or TAG.
function __shifter_type_or_tag
    set -l type (commandline -opc)[-1]
    switch $type
        case docker custom id
            __shifter_images | string replace -f -r "^$type:" ''
        case local
            __fish_complete_directories (commandline -ct)
        case '*'
            printf '%s\n' docker custom id local
    end
end

complete -c setupRoot -f -a '(__shifter_type_or_tag)'
complete -c setupRoot -s h -l help -d 'Show help'
complete -c setupRoot -l version -d 'Show the version'
complete -c setupRoot -s u -l user -x -a '(__fish_complete_users)' -d 'User of the job'
complete -c setupRoot -s U -l uid -x -d "The user's id"
complete -c setupRoot -s G -l gid -x -d 'Group of the job'
complete -c setupRoot -s v -l volume -x -a '(__fish_complete_directories)' -d 'Mount a directory: FROM:TO[:ro]'
complete -c setupRoot -s m -l module -x -a none -d 'Use site modules'
complete -c setupRoot -s N -l node-spec -x -a '(__fish_print_hostnames)/' -d "The job's nodes: HOST/TASKS"
complete -c setupRoot -l nodes -r -F -d 'Nodes from a file'
complete -c setupRoot -l job -x -a '(__shifter_jobs)' -d 'Id of the job'
complete -c setupRoot -l restart -x -d 'How often it was restarted'
complete -c setupRoot -l sshd -d 'An sshd runs in the UDI'
complete -c setupRoot -l no-sshd -d 'None does'
complete -c setupRoot -s s -l key -x -d 'Further public key'
complete -c setupRoot -l authorize -r -F -d 'Further public keys from a file'
complete -c setupRoot -s V -l verbose -d 'Say what was done'
complete -c setupRoot -l json -d 'Print JSON'
complete -c setupRoot -l from-json -r -F -d 'All about the job from a file'

complete -c unsetupRoot -f
complete -c unsetupRoot -s h -l help -d 'Show help'
complete -c unsetupRoot -l version -d 'Show the version'
complete -c unsetupRoot -l job -x -a '(__shifter_jobs)' -d 'Id of the job'
complete -c unsetupRoot -l json -d 'Print JSON'
